"""Tables without comparisons: all runs, the phases of a step, the original's figures, evaluations of SimCLS."""

import re

from reporting import published
from reporting.comparison import Sample, number, quantity
from reporting.records import Record, provenance
from reporting.studies import loading_label, recomputation_label, test_accuracy
from reporting.tables import CPU_NOTE, hardware, markdown, one_a_seed, place, settings

ABSOLUTE_FOLDER = re.compile(r"(?<=\s)/\S*/")
METRICS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
PHASES = ("data load", "data copy", "zero grad", "forward", "backward", "optimizer")


def by_place(runs):
    """[(hardware dict, [[runs that differ only in their seeds], ...]), ...], in order of first appearance."""
    places = {}
    for run in runs:
        where, what = hardware(run), settings(run)
        _, repeats = places.setdefault(str(where), (where, {}))
        repeats.setdefault(str(sorted(what.items(), key=str)), []).append(run)
    return [(where, [one_a_seed(runs) for runs in repeats.values()]) for where, repeats in places.values()]


# Settings that already appear in other columns, in other words.
SHOWN = {
    "experiment", "model", "model_type", "dataset", "data_dir", "batch_size", "num_worker", "num_workers", "loader",
    "half_precision", "policy", "memory_budget", "budget_of", "max_steps", "num_epoch",
}  # fmt: skip


def _tables(runs, cells, with_cpu_times):
    """A table for each hardware. cells(repeats, with_times) gives a row; further settings that differ are added to
    it."""
    parts = []
    for where, rows in by_place(runs):
        on_cpu = rows[0][0].on_cpu
        further = further_settings([repeats[0] for repeats in rows])
        table = markdown(
            [cells(repeats, with_cpu_times or not on_cpu) | more for repeats, more in zip(rows, further, strict=True)]
        )
        made = provenance([run.record for repeats in rows for run in repeats])
        parts += [f"{place(where)}{'; ' * bool(made)}{made}:", table, *[CPU_NOTE] * (on_cpu and with_cpu_times)]
    return "\n\n".join(parts)


def further_settings(runs):
    """For each of `runs` {argument: value as text}, with the arguments that differ between runs of one experiment and
    that no column shows."""
    found = [settings(run, SHOWN) for run in runs]
    differing = []
    for name in dict.fromkeys(name for each in found for name in each):
        of_experiment = {}
        for run, each in zip(runs, found, strict=True):
            of_experiment.setdefault(run.experiment, set()).add(str(each.get(name)))
        if any(len(values) > 1 for values in of_experiment.values()):
            differing.append(name)
    return [{name: str(each[name]) if name in each else None for name in differing} for each in found]


def _description(repeats):
    """The first cells of a row: what the runs were."""
    run = repeats[0]
    arguments = run.arguments
    recomputed = recomputation_label(run) if run.experiment != "simcls" else None
    return {
        "Experiment": run.experiment,
        "Model": arguments.get("model", arguments.get("model_type")),
        "Data": run.data,
        "Batch": str(arguments["batch_size"]) if "batch_size" in arguments else None,
        "Loading": loading_label(run),
        "Precision": run.precision,
        "Recomputed": None if recomputed == "none" else recomputed,
        "Steps": str(arguments["max_steps"]) if arguments.get("max_steps") else None,
        "Epochs": str(len(run.curve("loss"))) if run.curve("loss") else None,
        "n": str(len(repeats)),
    }


def every_run(runs, with_cpu_times=True):
    """One row for each set-up: its load, step and epoch time, memory and result."""

    def cells(repeats, with_times):
        def of(figure):
            return quantity(Sample.of(map(figure, repeats)))

        times = {
            "Load, ms": of(Record.load_ms),
            "Step, ms": of(Record.step_ms),
            "Epoch, s": of(Record.epoch_seconds),
            "Samples/s": of(Record.samples_per_second),
        }
        return {
            **_description(repeats),
            **(times if with_times else {}),
            "Peak memory, GB": of(Record.allocated_gb),
            "Saved for backward, MiB": of(Record.saved_mib),
            "Training loss": of(lambda run: run.last("loss")),
            "Test accuracy, %": quantity(Sample.of(map(test_accuracy, repeats)), places=1),
        }

    return _tables(runs, cells, with_cpu_times)


def step_phases(runs, with_cpu_times=True):
    """One row for each set-up: the share of each phase in the epoch."""

    def cells(repeats, with_times):
        timings = [run.timing() for run in repeats]
        names = [*PHASES, *sorted({name for timing in timings for name in timing["phases"]} - {*PHASES, "step"})]
        shares = {f"{name.capitalize()}, %": quantity(Sample.of(_shares(timings, name)), places=1) for name in names}
        unphased = Sample.of(100 * timing["unphased_seconds"] / timing["seconds"] for timing in timings)
        shares["In no phase, %"] = quantity(unphased, places=1)
        times = {"Step, ms": quantity(Sample.of(map(Record.step_ms, repeats)))}
        description = {key: text for key, text in _description(repeats).items() if key != "Steps"}
        return {**description, **(times if with_times else {}), **shares}

    return _tables([run for run in runs if run.timed_epochs], cells, with_cpu_times)


def _shares(timings, name):
    return [100 * timing["phases"][name]["share"] for timing in timings if name in timing["phases"]]


def phase_table(timing):
    """The phases of a timing, as returned by PhaseTimer.end_epoch, as a Markdown table with host and device times."""
    rows = []
    for name, phase in timing["phases"].items():
        cells = {"Phase": name, "Count": str(phase["count"])}
        for side in ("host", "device"):
            times = phase[f"{side}_ms"] or {}
            for key in ("median", "p95"):
                cells[f"{side.capitalize()} {key}, ms"] = _number(times.get(key))
            cells[f"{side.capitalize()} total, s"] = _number(times.get("total"), 1e-3)
        rows.append(cells | {"Share, %": f"{100 * phase['share']:.1f}"})
    share = timing["unphased_seconds"] / timing["seconds"]
    rows.append({"Phase": "in no phase", "Share, %": f"{100 * share:.1f}"})
    return markdown(rows)


def _number(figure, scale=1.0):
    return None if figure is None else number(scale * figure, digits=4)


def original_study():
    headers = {
        "load_ms": "Load, ms",
        "optimizer_ms": "Optimizer, ms",
        "step_ms": "Step, ms",
        "epoch_s": "Epoch, s",
        "overall_s": "Overall, s",
        "memory_gb": "Memory, GB",
    }
    arms = published.DATA_LOADER | {(128, "half precision"): published.MIXED_PRECISION[128, "fp16"]}
    for (batch_size, policy), figures in published.CHECKPOINTING.items():
        label = "2 workers" if policy == "none" else "nested checkpointing"
        arms[batch_size, label] = arms.get((batch_size, label), {}) | figures
    rows = [
        {"Arm": arm, "Batch": str(batch_size)}
        | {header: str(figures[key]) if key in figures else None for key, header in headers.items()}
        for (batch_size, arm), figures in sorted(arms.items(), key=lambda item: item[0][0])
    ]
    return f"{published.SETUP}, as published:\n\n{markdown(rows)}"


def evaluations(records):
    """A table of ROUGE by each way to choose a summary, for the records of SimCLS/evaluate_model.py; records that
    differ only in the scorer's seed share a table."""
    same = {}
    for record in records:
        what = {name: value for name, value in record["arguments"].items() if name not in ("scorer_path", "output")}
        metrics = sorted({metric for of_system in record["systems"].values() for metric in of_system})
        where = record["machine"].get("hardware")
        how = record.get("training")  # Of the scorer, without its seed; absent from older records.
        same.setdefault(str((what, metrics, record.get("documents"), where, how)), []).append(record)
    return "\n\n".join(map(_evaluation, same.values()))


def _evaluation(repeats):
    """The tables of one record, with intervals; or of several, with means and deviations, and the highest p-values."""
    first = repeats[0]
    rows = []
    # A scorer whose other terms weigh nothing has no row of its own next to SimCLS.
    for name, metrics in max((record["systems"] for record in repeats), key=len).items():
        have_it = [record["systems"][name] for record in repeats if name in record["systems"]]
        cells = {"Summary": name + _how_many(have_it, repeats)}
        for metric, interval in metrics.items():
            low, high = 100 * interval["low"], 100 * interval["high"]
            sample = Sample.of(100 * system[metric]["mean"] for system in have_it if metric in system)
            range_text = f" ({low:.2f} to {high:.2f})" if len(repeats) == 1 else ""
            cells[f"{METRICS.get(metric, metric)}, %"] = quantity(sample, places=2) + range_text
        if first.get("words"):
            sample = Sample.of((each.get("words") or {}).get(name) for each in repeats)
            cells["Words"] = quantity(sample, places=1)
        rows.append(cells)
    several = len(repeats) > 1
    meaning = f"mean ± standard deviation over {len(repeats)} scorers" if several else "95 % intervals"
    machine = first["machine"]
    # Without the folders of the machine that made the record.
    command = ABSOLUTE_FOLDER.sub("", machine.get("command") or "unknown command")
    where = machine.get("hardware") or "unknown hardware"
    caption = [f"{first.get('documents', 'unknown')} documents, {meaning}", where, provenance(repeats)]
    parts = [f"{'; '.join(filter(None, caption))}:", markdown(rows)]
    if tests := _p_rows(repeats):
        parts += [f"Paired permutation tests, p{' (the highest of the scorers)' * several}:", markdown(tests)]
    notes = [f"Command{' of the first scorer' * several}: `{command}`"]
    notes += [first["rouge"]] if first.get("rouge") else []
    notes += sorted({f"Warning: {line}." for record in repeats for line in record.get("warnings") or ()})
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def _p_rows(repeats):
    """A row for each system that SimCLS, and then the scorer alone, were tested against: the highest p of all."""
    rows = []
    for whose, key in (("SimCLS", "p_values"), ("scorer alone", "p_values_alone")):
        tests = [each[key] for each in repeats if each.get(key)]
        for name in tests[0] if tests else ():
            same = [p_values[name] for p_values in tests if name in p_values]
            worst = {
                METRICS.get(metric, metric): max(each[metric] for each in same if metric in each) for metric in same[0]
            }
            strongest = " (the strongest)" if name == repeats[0].get("strongest") else ""
            cells = {metric: f"{p:.2g}" for metric, p in worst.items()}
            rows.append({"Test": f"{whose} against {name}{strongest}{_how_many(same, repeats)}"} | cells)
    return rows


def _how_many(have_it, repeats):
    return "" if len(have_it) == len(repeats) else f" ({len(have_it)} of {len(repeats)} scorers)"
