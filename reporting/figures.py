"""The figures, drawn from run records with matplotlib.

Times on a CPU appear as multiples of a baseline's step: they mean nothing away from the machine.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from harness.files import atomic_write
from reporting.comparison import Sample
from reporting.overview import PHASES
from reporting.records import Record, combine, provenance
from reporting.studies import CHECKPOINTING, DATA_LOADER, MIXED_PRECISION, SIMCLS, TOGETHER
from reporting.tables import groups, hardware, place

WIDTH = 10  # Inches: 1,000 pixels, which README shows about as they are.
STYLE = {"font.size": 10, "figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}
COLOURS = 128
CURVES = {"loss": "training loss", "acc": "training accuracy, %", "test_acc": "test accuracy, %"}
MARKERS = "osD^vP*X<>hd"
LINES = ("-", "--", ":", "-.")
FEW_EPOCHS = 3  # Fewer make no curve.
LINE_WIDTH = 0.01  # Of a panel's height.
SIDES = {"host": "host time", "device": "GPU time"}


def draw_all(runs, measured, folder):
    """Draw into `folder` every figure that there are records for; returns the paths written.

    runs: Records. measured: the benchmarks' records, as benchmarks.read gives them.
    """
    from reporting.frontier import draw_frontier  # They take their style from this module.
    from reporting.headline_figures import draw_time_to_accuracy, draw_waterfall
    from reporting.step_memory import draw_step_memory

    written = [*draw_waterfall(runs, folder), *draw_time_to_accuracy(runs, folder), *draw_studies(runs, folder)]
    return [*written, *draw_frontier(measured, folder), *draw_step_memory(measured, folder)]


def draw_studies(runs, folder):
    """Draw into `folder` the figures of the studies; returns the paths written."""
    pictures = {
        "resnext_data_loader": (draw_curves, DATA_LOADER, CURVES),
        "resnext_mixed_precision": (draw_curves, MIXED_PRECISION, CURVES),
        "resnext_checkpointing": (draw_curves, CHECKPOINTING, CURVES),
        "resnext_together": (draw_curves, TOGETHER, CURVES),
        "simcls_loss": (draw_losses, SIMCLS),
        "step_timeline": (draw_timeline, (DATA_LOADER, MIXED_PRECISION, CHECKPOINTING)),
        "checkpointing_memory": (draw_memory, CHECKPOINTING),
    }
    written = []
    for name, (draw, *what) in pictures.items():
        with plt.rc_context(STYLE):
            figure = draw(runs, *what)
        if figure is not None:
            path = folder / f"{name}.png"
            save(figure, path)
            plt.close(figure)
            written.append(path)
    return written


def save(figure, path):
    """Write a PNG of few colours: a third of the size, and the same bytes for the same records."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(
        COLOURS, Image.Quantize.MAXCOVERAGE
    )
    with atomic_write(path) as file:
        picture.save(file, format="PNG", optimize=True)


def on_cpu(group):
    return group.rows[0].runs[0].on_cpu


def chosen(study, runs):
    """The Group of a study that its figure shows: on a GPU before a CPU, then the one with most rows; or None."""
    return min(groups(study, runs), key=on_cpu, default=None)


def chosen_for_curves(study, runs):
    """The same for curves: one of some epochs before short ones, then on a GPU, then the longest, then most rows."""

    def rank(group):
        epochs = max(len(run.curve("loss")) for row in group.rows for run in row.runs)
        return epochs < FEW_EPOCHS, on_cpu(group), -epochs

    return min(groups(study, runs), key=rank, default=None)


def heading(group):
    """ "resnext29_4x64d, cifar10, batch 128": what the rows of a group have in common."""
    words = [str(group.settings[name]) for name in ("model", "dataset") if name in group.settings]
    keys = {row.keys for row in group.rows}
    if "batch_size" in group.settings:
        words.append(f"batch {group.settings['batch_size']}")
    elif len(keys) == 1:
        words += [f"batch {key}" for key in keys.pop()]
    return ", ".join(words)


def facts(group):
    """ "AMD EPYC, 2 cores, torch 2.13.0; n = 3; commit 1f098ca, 2026-11-23": where, how often and of what code."""
    numbers = sorted({len(row.runs) for row in group.rows})
    runs = [run for row in group.rows for run in row.runs]
    n = f"n = {numbers[0]}" if len(numbers) == 1 else f"n = {numbers[0]} to {numbers[-1]}"
    return "; ".join(filter(None, [place(group.machine), n, provenance([run.record for run in runs])]))


def distinct_colours(names):
    """{name: a colour that no other has}."""
    names = list(dict.fromkeys(names))
    few = matplotlib.color_sequences["petroff10"]  # Told apart by colour-blind readers, too.
    colours = few if len(names) <= len(few) else plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(names)))
    return dict(zip(names, colours, strict=False))


def distinct_styles(rows, styles):
    """{keys of a Row, such as (128,): one of `styles`}."""
    keys = sorted({row.keys for row in rows})
    return {each: styles[index % len(styles)] for index, each in enumerate(keys)}


def draw_curves(runs, study, curves):
    """Each of `curves`, key of an epoch -> axis label, by epoch: for each arm the mean over the seeds that all have, in
    a band from the lowest to the highest of them."""
    group = chosen_for_curves(study, [run for run in runs if run.curve("loss")])
    if group is None:
        return None
    seeds = set.intersection(*({run.arguments.get("seed") for run in row.runs} for row in group.rows))
    figure, panels = plt.subplots(1, len(curves), figsize=(WIDTH, 4.2), layout="constrained", squeeze=False)
    colours = distinct_colours(row.arm.label for row in group.rows)
    styles = distinct_styles(group.rows, LINES)
    equal = []
    for panel, (key, title) in zip(panels[0], curves.items(), strict=True):
        means = []
        for index, row in enumerate(group.rows):
            values = _values_by_epoch(row, key, seeds)
            epochs, colour = np.arange(1, values.shape[1] + 1), colours[row.arm.label]
            means.append(values.mean(0))
            style = {"linestyle": styles[row.keys], "linewidth": _width(index, group)}
            panel.plot(epochs, means[-1], color=colour, **style)
            if len(values) > 1:
                panel.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        equal.append(coincide(means, panel))
        panel.set(xlabel="epoch", ylabel=title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(
        figure, _arm_handles(colours) + _key_handles(styles, "linestyle"), _title(study.title, group, all(equal))
    )


def _values_by_epoch(row, key, seeds):
    """float [runs, epochs]: the curve `key` of the runs of a Row that have one of `seeds`, of all its runs without."""
    curves = [run.curve(key) for run in row.runs if not seeds or run.arguments.get("seed") in seeds]
    return np.array([curve[: min(map(len, curves))] for curve in curves])


def coincide(curves, panel):
    """Whether `curves`, sequences of values that `panel` shows, are nowhere further apart than a line is wide."""
    if len(set(map(len, curves))) > 1:
        return False
    return bool(np.ptp(curves, axis=0).max(initial=0) <= LINE_WIDTH * np.ptp(panel.get_ylim()))


def _width(index, group):
    """Many techniques change no result: of equal lines the later are drawn thinner, on top."""
    return 1.2 + 4 * (1 - (index + 1) / len(group.rows))


def _title(text, group, all_curves_coincide=False):
    lines = [f"{text}: {heading(group)}", facts(group)]
    return "\n".join(lines + [f"all {len(group.rows)} curves coincide"] * all_curves_coincide)


def _arm_handles(colours):
    """The part of a legend that names the arms."""
    return [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]


def _key_handles(styles, kind):
    """The part of a legend that tells batch sizes apart, where there are several. kind: "linestyle" or "marker"."""
    fixed = {"color": "grey", "linestyle": "none"}
    names = {keys: ", ".join(f"batch {key}" for key in keys) for keys in styles}
    handles = [Line2D([], [], label=names[keys], **(fixed | {kind: style})) for keys, style in styles.items()]
    return handles if len(handles) > 1 else []


def draw_losses(runs, study):
    """The training loss by update, a line for each run, the arms by colour."""
    group = chosen_for_curves(study, [run for run in runs if run.losses()])
    if group is None:
        return None
    figure, panel = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    colours = distinct_colours(row.arm.label for row in group.rows)
    of_seed = {}
    for index, row in enumerate(group.rows):
        for run in row.runs:
            updates, losses = zip(*run.losses(), strict=True)
            of_seed.setdefault(run.arguments.get("seed"), []).append(losses)
            panel.plot(updates, losses, color=colours[row.arm.label], linewidth=_width(index, group))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set(xlabel="update", ylabel="training loss", ylim=(0, None))
    equal = all(len(curves) == len(group.rows) and coincide(curves, panel) for curves in of_seed.values())
    return _finish(figure, _arm_handles(colours), _title(study.title, group, equal))


def _finish(figure, handles, title):
    """Put the title above and one legend below."""
    figure.get_layout_engine().set(w_pad=0.12)
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    figure.suptitle(title, fontsize=11)
    return figure


def draw_timeline(runs, studies):
    """The phases of a median step one after another; for each arm a row of host times and one of GPU times."""
    arms = _arms(runs, studies)
    bars = [bar for arm in arms for bar in _bars(*arm)]
    if not bars:
        return None
    figure, panel = plt.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(bars)), layout="constrained")
    colours = distinct_colours(PHASES)
    for position, (_, phases) in enumerate(bars):
        left = 0.0
        for name, colour in colours.items():
            panel.barh(position, phases.get(name, 0.0), left=left, color=colour, height=0.75)
            left += phases.get(name, 0.0)
    panel.set_yticks(range(len(bars)), [name for name, _ in bars])
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
    run = arms[0][1].runs[0]
    multiples = "time, multiples of the step of each bar's own baseline, whose other settings are the same"
    panel.set_xlabel(multiples if run.on_cpu else "time, ms")
    title = f"{run.arguments['model']}, batch {run.arguments['batch_size']}; {place(hardware(run))}"
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    return _finish(figure, handles, f"One training step by phase: {title}")


def _arms(runs, studies):
    """[(label, Row, its baseline Row), ...] of several studies, as far as they are of one model, data, batch size and
    hardware; the baseline comes first, and once."""
    arms, common = [], None
    for study in studies:
        group = chosen(study, runs)
        for row in group.rows if group else ():
            base = group.baseline(row)
            if base is None or not base.runs[0].step_ms() or (row is base and arms):
                continue
            run = row.runs[0]
            same = [run.arguments["model"], run.data, run.arguments["batch_size"], hardware(run)]
            if common in (None, same):
                common = same
                arms.append(("baseline" if row is base else _arm_name(study, row), row, base))
    return arms


def _arm_name(study, row):
    """A label that needs no table around it: "loader on device", "recomputing chain"."""
    label = row.arm.label
    if study is CHECKPOINTING:
        return f"recomputing {label}"
    return label.replace("device", "loader on device") if study is DATA_LOADER else label


def _bars(name, row, base):
    """[(label, {phase: median length}), ...] of an arm: host, and GPU where that was timed."""
    timing, scale = combine([run.timing() for run in row.runs if run.epochs]), 1.0
    if row.runs[0].on_cpu:
        scale = combine([run.timing() for run in base.runs if run.epochs])["phases"]["step"]["host_ms"]["median"]
    bars = []
    for side, words in SIDES.items():
        times = {phase: found[f"{side}_ms"] for phase, found in timing["phases"].items()}
        if all(times.values()):
            lengths = {phase: time["median"] / scale for phase, time in times.items() if time["median"] is not None}
            bars.append((name if row.runs[0].on_cpu else f"{name}, {words}", lengths))
    return bars


def draw_memory(runs, study):
    """Memory against step time, both as multiples of the plain run's: a colour for each policy, whose name stands
    beside its points, and a marker for each batch size."""
    group = chosen(study, runs)
    if group is None:
        return None
    memory = Record.saved_mib if on_cpu(group) else Record.allocated_gb
    figure, panel = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    colours = distinct_colours(row.arm.label for row in group.rows)
    markers = distinct_styles(group.rows, MARKERS)
    points = {}
    for row in group.rows:
        point = _multiples(row, group.baseline(row), Record.step_ms, memory)
        if point:
            points.setdefault(row.arm.label, []).append(point)
            panel.plot(*point, markers[row.keys], color=colours[row.arm.label], markersize=9)
    for name, of_policy in points.items():
        panel.plot(*zip(*of_policy, strict=True), color=colours[name], linewidth=1)
        panel.annotate(name, max(of_policy), xytext=(8, 5), textcoords="offset points", color=colours[name])
    panel.margins(x=0.1)
    panel.set_xlabel("step time, multiples of the plain run's at the same batch size")
    what = "activation memory saved for backward" if on_cpu(group) else "peak allocated GPU memory"
    panel.set_ylabel(f"{what},\nmultiples of the plain run's")
    panel.set_ylim(0, max(1.1, panel.get_ylim()[1]))
    return _finish(figure, _key_handles(markers, "marker"), _title("Memory against time", group))


def _multiples(row, base, *figures):
    """The means over a Row's runs of `figures`, each of a Record, over those of the Row `base`; None without one."""
    samples = [(Sample.of(map(each, row.runs)), base and Sample.of(map(each, base.runs))) for each in figures]
    return [new.mean / old.mean for new, old in samples] if all(new and old for new, old in samples) else None
