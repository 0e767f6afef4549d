"""What the records say in sentences: one per technique for the README, and what interrupted runs lost."""

from harness import shapes
from reporting import accuracy, headline
from reporting.comparison import Sample, interval_text
from reporting.headline import SAME
from reporting.records import provenance
from reporting.studies import loading_label
from reporting.tables import markdown

PAGE = "/docs/techniques/"
DOCSTRINGS = "docstrings of Python packages"
TRIALS = shapes.each(list, {"fault": shapes.TEXT, "tried": shapes.COUNT, "survived": shapes.COUNT})


def bullets(runs, evaluations):
    """Markdown: a list of the effects of the techniques, with links to their pages; "" without any record."""
    found = headline.effects(runs)
    lines = [
        _loading(found),
        _by_hardware(found, "mixed-precision", "**Half precision**", "half-precision"),
        _recomputation(found),
        _everything(found, runs),
        _re_ranking(evaluations),
    ]  # fmt: skip
    return "\n".join(f"- {line}" for line in lines if line)


def _loading(effects):
    """From the first effect of loading without workers; otherwise, without a ratio, from the first baseline that loads
    as the original did, with real images before digits."""
    without = [each for each in effects if each.label == "0 workers" and each.time]
    bases = [each.group.baseline(each.row).runs for each in without or effects if each.study != "simcls"]
    bases = [runs for runs in bases if loading_label(runs[0]) == "2 workers"]
    sample = Sample.of(run.load_percent() for run in bases[0]) if bases else None
    if sample is None:
        return None
    text = f"with two worker processes, {sample.mean:.1f} % of the step time is spent waiting for images"
    if without:
        text += f"; without workers, an epoch takes {interval_text(*without[0].time)} × as long"
    return f"**Loading**: {text} ([page]({PAGE}loading.md))."


def _by_hardware(effects, study, title, page):
    """The epoch time of the first row for each kind of hardware."""
    ratios = {}
    for each in effects:
        if each.study == study and each.time:
            ratios.setdefault(each.hardware, each.time[0])
    if not ratios:
        return None
    places = [
        f"{ratio:.2f} × as long ({', '.join(headline.own_words(hardware, ratios)) or hardware})"
        for hardware, ratio in ratios.items()
    ]
    return f"{title}: an epoch takes {', '.join(places)} ([page]({PAGE}{page}.md))."


def _recomputation(effects):
    found = [each for each in effects if each.study == "checkpointing" and each.memory and each.time]
    if not found:
        return None
    least = min(found, key=lambda each: each.memory[0])
    text = f"{least.memory[0]:.2f} × the memory for {least.time[0]:.2f} × the time"
    same = ", with identical results" if least.result == SAME else ""
    return f"**Recomputing activations**: {text}{same} ([page]({PAGE}recomputation.md))."


def _everything(effects, runs):
    for race in accuracy.races(runs):
        ratio = accuracy.ratio_of(race, "everything on")
        if ratio:
            text = f"{ratio} × the time of the original (`resnext.py` without options) until {race.target:.1f} % test "
            text += f"accuracy, the highest that all its runs attain{_furthest(runs)}"
            return f"**Everything on**: {text} ([page]({PAGE}everything-on.md))."
    return _by_hardware(effects, "together", "**Everything on**", "everything-on")


def _furthest(runs):
    """The final accuracy of the best run on real images, as text to append to a sentence."""
    fast = [run for run in runs if run.experiment == "resnext_fast" and run.data != "digits"]
    best = max((run for run in fast if run.last("test_acc")), key=lambda run: run.last("test_acc"), default=None)
    if best is None:
        return ""
    model, epochs = best.arguments["model"], len(best.epochs)
    return f"; one run of {model} attained {best.last('test_acc'):.1f} % in {epochs} epochs"


def _re_ranking(evaluations):
    gains = []
    for record in evaluations:
        figures = [_rouge(record["systems"].get(name, {})) for name in ("generator", "SimCLS", record.get("strongest"))]
        if all(figures):
            text = DOCSTRINGS if record["arguments"].get("dataset_name") == "sample" else "documents"
            gains.append((*figures, record["strongest"], f"{record.get('documents', 'all')} {text}"))
    if not gains:
        return None
    first, chosen, without, free, documents = min(gains, key=lambda each: each[1][0] - each[0][0])
    first, chosen, without = (" / ".join(f"{each:.1f}" for each in figures) for figures in (first, chosen, without))
    text = f"on {documents}, ROUGE-1 / 2 / L go from {first} to {chosen}; "
    text += f"the best rule without a scorer ({free}) has {without}"
    return f"**Choosing among summaries** (SimCLS): {text} ([page](/docs/simcls.md#what-it-buys))."


def _rouge(system):
    """[ROUGE-1, -2, -L] of a system of an evaluation in percent; None if one is not known."""
    figures = [system.get(name) for name in ("rouge1", "rouge2", "rougeL")]
    return [100 * figure["mean"] for figure in figures] if all(figures) else None


def faults(measured):
    """Markdown: by kind of fault, how many trials of tests/faults.py there were, and in how many nothing was lost."""
    parts = []
    for hardware, records in measured.items():
        for record in records:
            trials = record.get("trials")
            if record["benchmark"] != "faults" or shapes.fault(trials, TRIALS):
                continue
            kinds = {}
            for trial in trials:
                tried, survived = kinds.get(trial["fault"], (0, 0))
                kinds[trial["fault"]] = tried + trial["tried"], survived + trial["survived"]
            tried, survived = (sum(pair[index] for pair in kinds.values()) for index in (0, 1))
            rows = [{"Fault": kind, "Trials": str(n), "Nothing lost": str(kept)} for kind, (n, kept) in kinds.items()]
            parts += [f"{survived} of {tried} trials lost nothing; {hardware}; {provenance([record])}:", markdown(rows)]
    return "\n\n".join(parts)
