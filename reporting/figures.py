"""The figures, drawn from run records with matplotlib.

Times on a CPU appear as multiples of a baseline's step, since they mean nothing on another machine.
"""

import os
import textwrap
import warnings

os.environ["MPLBACKEND"] = "agg"  # Figures go to files; an unknown backend in it makes matplotlib raise an error.

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from harness.files import atomic_write
from reporting import pace
from reporting.comparison import Sample
from reporting.overview import PHASES
from reporting.records import Record, provenance, warn
from reporting.studies import CHECKPOINTING, DATA_LOADER, MIXED_PRECISION, SIMCLS, TOGETHER, in_words
from reporting.tables import data_name, groups, hardware, is_toy, multiple, place

WIDTH = 10  # Inches: 1,000 pixels, about the size at which the README shows them.
STYLE = {"font.size": 10, "figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
         "text.parse_math": False}  # fmt: skip
COLOURS = 256
CURVES = {"loss": "training loss", "acc": "training accuracy, %", "test_acc": "test accuracy, %"}
MARKERS = "osD^vP*X<>hd"
LINES = ("-", "--", ":", "-.")
LINE_WIDTH = 0.01  # As a share of a panel's height.
TITLE_WIDTH = 110  # Characters.
LEGEND_WIDTH = 150  # Characters in a line of a legend, including its marks.
SMOOTH = 20  # From 2 * SMOOTH losses on, a running mean over 1 / SMOOTH of them is drawn.
SIDES = {"host": "host time", "device": "GPU time"}


def draw_all(runs, measured, folder):
    """Draw every figure for which there are records into `folder`; returns the paths written.

    runs: Records. measured: the benchmarks' records, as returned by benchmarks.read.
    """
    from reporting import frontier, headline, headline_figures, step_memory  # They import their style from this module.

    pictures = {
        "techniques": (headline_figures.draw, headline.distinct(headline.effects(runs))),
        "time_to_accuracy": (headline_figures.draw_time_to_accuracy, runs),
        "resnext_data_loader": (draw_curves, runs, DATA_LOADER),
        "resnext_mixed_precision": (draw_curves, runs, MIXED_PRECISION),
        "resnext_checkpointing": (draw_curves, runs, CHECKPOINTING),
        "resnext_together": (draw_curves, runs, TOGETHER),
        "simcls_loss": (draw_losses, runs),
        "step_timeline": (draw_timeline, runs, (DATA_LOADER, MIXED_PRECISION, CHECKPOINTING)),
        "checkpointing_memory": (draw_memory, runs),
        "memory-frontier": (frontier.draw, chosen_record(measured, "memory", frontier.is_whole)),
        "step_memory": (step_memory.draw, chosen_record(measured, "step_memory", step_memory.is_whole)),
    }
    written = []
    for name, (draw, shown, *what) in pictures.items():
        with plt.rc_context(STYLE):
            figure = draw(shown, *what) if shown else None
        if figure is not None:
            written.append(save(figure, folder / f"{name}.png"))
    return written


def chosen_record(measured, benchmark, is_whole):
    """The record of `benchmark` that its figure shows: among the complete ones, one from a GPU, else one from a CPU; or
    None. measured: as for `draw_all`."""
    records = [record for group in measured.values() for record in group if record["benchmark"] == benchmark]
    return min(filter(is_whole, records), key=lambda record: record["machine"].get("device") == "cpu", default=None)


def save(figure, path):
    """Write a PNG with few colours: a third of the size, and the same bytes for the same records. Closes the figure and
    returns `path`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing from font")
        try:
            figure.canvas.draw()
        except UserWarning:
            warn(f"{path}: the font lacks some letters of the names, which are shown as boxes")
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(
        COLOURS, Image.Quantize.MAXCOVERAGE
    )
    with atomic_write(path) as file:
        picture.save(file, format="PNG", optimize=True)
    plt.close(figure)
    return path


def on_cpu(group):
    return group.rows[0].runs[0].on_cpu


def chosen_for_curves(study, runs):
    """The Group of a study whose curves are shown, or None: preferably not of short runs, on real data, on a GPU, with
    the most epochs and then the most rows."""

    def rank(group):
        epochs = pace.epochs(group)
        return epochs < pace.FEW_EPOCHS, is_toy(group), on_cpu(group), -epochs

    return min(groups(study, runs), key=rank, default=None)


def heading(group):
    """ "resnext29_4x64d, CIFAR-10, batch 128": what the rows of a group have in common."""
    words = [*filter(None, [group.settings.get("model")]), data_name(group)]
    keys = {row.keys for row in group.rows}
    if "batch_size" in group.settings:
        words.append(f"batch {group.settings['batch_size']}")
    elif len(keys) == 1:
        words += [f"batch {key}" for key in keys.pop()]
    return ", ".join(words)


def facts(machine, repeats):
    """ "AMD EPYC, 2 cores, torch 2.13.0; n = 3; commit 1f098ca, 2026-11-23": where, how often and with which code.

    machine: as returned by tables.hardware. repeats: the runs of each row, [[Record, ...], ...].
    """
    numbers = sorted({len(runs) for runs in repeats})
    n = f"n = {numbers[0]}" if len(numbers) == 1 else f"n = {numbers[0]} to {numbers[-1]}"
    records = [run.record for runs in repeats for run in runs]
    return "; ".join(filter(None, [place(machine), n, provenance(records)]))


def distinct_colours(names):
    """{name: a distinct colour}."""
    names = list(dict.fromkeys(names))
    few = matplotlib.color_sequences["petroff10"]  # Distinguishable for colour-blind readers, too.
    colours = few if len(names) <= len(few) else plt.get_cmap("turbo")(np.linspace(0.05, 0.95, len(names)))
    return dict(zip(names, colours, strict=False))


def distinct_styles(rows, styles):
    """{keys of a Row, such as (128,): one of `styles`}."""
    keys = sorted({row.keys for row in rows})
    return {each: styles[index % len(styles)] for index, each in enumerate(keys)}


def draw_curves(runs, study):
    """Each of CURVES by epoch: for each arm the mean over its seeds, with a band from their lowest to their highest.
    Where arms differ in one technique, only the seeds that all arms have count: most techniques then give the same
    curve."""
    group = chosen_for_curves(study, [run for run in runs if run.curve("loss")])
    if group is None:
        return None
    if study.same is None:
        _keep_common_seeds(group)
    figure, panels = plt.subplots(1, len(CURVES), figsize=(WIDTH, 4.2), layout="constrained")
    colours = distinct_colours(in_words(row.arm.label) for row in group.rows)
    styles = distinct_styles(group.rows, LINES)
    equal = []
    for panel, (key, title) in zip(panels, CURVES.items(), strict=True):
        means = []
        for index, row in enumerate(group.rows):
            values = stacked(run.curve(key) for run in row.runs)
            style = {"linestyle": styles[row.keys], "linewidth": _width(index, group)}
            means.append(values.mean(0))
            draw_band(panel, np.arange(1, values.shape[1] + 1), values, colours[in_words(row.arm.label)], **style)
        equal.append(coincide(means, panel))
        smoothed = key == "loss" and any(run.arguments.get("label_smoothing") for row in group.rows for run in row.runs)
        panel.set(xlabel="epoch", ylabel=title + " (higher with label smoothing)" * smoothed)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = figure_title(study.title, group, all(equal), banded=True)
    return finish(figure, arm_handles(colours) + _key_handles(styles, "linestyle"), title)


def _keep_common_seeds(group):
    """Drop the runs of seeds that not all rows of a Group have, if there is a seed that all have: other seeds give
    other curves."""
    seeds = set.intersection(*({run.arguments.get("seed") for run in row.runs} for row in group.rows))
    for row in group.rows if seeds else ():
        row.runs = [run for run in row.runs if run.arguments.get("seed") in seeds]


def stacked(curves):
    """float [curves, points], cut to the length of the shortest curve."""
    curves = list(curves)
    return np.array([curve[: min(map(len, curves))] for curve in curves], dtype=float)


def draw_band(panel, x, values, colour, **style):
    """The mean of `values` [runs, points] over x [points], with a band from the lowest run to the highest."""
    panel.plot(x, values.mean(0), color=colour, **style)
    if len(values) > 1:
        panel.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def coincide(curves, panel):
    """Whether `curves`, sequences of values shown in `panel`, are nowhere further apart than a line is wide."""
    if len(set(map(len, curves))) > 1:
        return False
    return bool(np.ptp(curves, axis=0).max(initial=0) <= LINE_WIDTH * np.ptp(panel.get_ylim()))


def _width(index, group):
    """Many techniques change no result: later lines are drawn thinner, on top, so that equal ones stay visible."""
    return 1.2 + 4 * (1 - (index + 1) / len(group.rows))


def figure_title(text, group, all_curves_coincide=False, banded=False):
    lines = [f"{text}: {heading(group)}", facts(group.machine, [row.runs for row in group.rows])]
    notes = [f"all {len(group.rows)} curves coincide"] * all_curves_coincide
    notes += ["bands: lowest to highest run"] * (banded and any(len(row.runs) > 1 for row in group.rows))
    return "\n".join([*lines, *["; ".join(notes)] * bool(notes)])


def arm_handles(colours):
    """The part of a legend that names the arms."""
    return [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]


def _key_handles(styles, kind):
    """The part of a legend that tells batch sizes apart, if there are several. kind: "linestyle" or "marker"."""
    fixed = {"color": "grey", "linestyle": "none"}
    names = {keys: ", ".join(f"batch {key}" for key in keys) for keys in styles}
    handles = [Line2D([], [], label=names[keys], **(fixed | {kind: style})) for keys, style in styles.items()]
    return handles if len(handles) > 1 else []


def draw_losses(runs):
    """The training loss by update: for each arm the mean over the seeds that all have, with a band from their lowest to
    their highest; as running means if there are many updates."""
    group = chosen_for_curves(SIMCLS, [run for run in runs if run.losses()])
    if group is None:
        return None
    _keep_common_seeds(group)
    figure, panel = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    colours = distinct_colours(in_words(row.arm.label) for row in group.rows)
    means, shortest = [], min(len(run.losses()) for row in group.rows for run in row.runs)
    window = shortest // SMOOTH if shortest >= 2 * SMOOTH else 1
    for index, row in enumerate(group.rows):
        points = stacked(run.losses() for run in row.runs)  # [runs, points, (update, loss)]
        values = np.apply_along_axis(np.convolve, 1, points[..., 1], np.full(window, 1 / window), "valid")
        means.append(values.mean(0))
        colour = colours[in_words(row.arm.label)]
        draw_band(panel, points[0, window - 1 :, 0], values, colour, linewidth=_width(index, group))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    label = f"training loss, mean of the last {window} points" if window > 1 else "training loss"
    panel.set(xlabel="update", ylabel=label, ylim=(0, None))
    return finish(figure, arm_handles(colours), figure_title(SIMCLS.title, group, coincide(means, panel), banded=True))


def finish(figure, handles, title):
    """Add the title above and one legend below."""
    figure.get_layout_engine().set(w_pad=0.12)
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        columns = max(1, min(4, len(handles), LEGEND_WIDTH // (longest + 8)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.suptitle("\n".join(textwrap.fill(line, TITLE_WIDTH) for line in title.split("\n")), fontsize=11)
    return figure


def draw_timeline(runs, studies):
    """The phases of a median step one after another; for each arm a row of host times and one of GPU times."""
    arms = _arms(runs, studies)
    bars = [bar for arm in arms for bar in _bars(*arm)]
    if not bars:
        return None
    figure, panel = plt.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(bars)), layout="constrained")
    colours = distinct_colours(PHASES)
    for position, (_, phases, deviation) in enumerate(bars):
        left = 0.0
        for name, colour in colours.items():
            panel.barh(position, phases.get(name, 0.0), left=left, color=colour, height=0.75)
            left += phases.get(name, 0.0)
        if deviation:
            panel.errorbar(left, position, xerr=deviation, color="black", linewidth=1.5, capsize=4)
    panel.set_yticks(range(len(bars)), [name for name, *_ in bars])
    panel.set_ylim(len(bars) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
    run = arms[0][1].runs[0]
    multiples = "step time, × that of the run without the technique"
    panel.set_xlabel(multiples if run.on_cpu else "time, ms")
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    title = f"One training step by phase: {run.arguments['model']}, {run.data}, batch {run.arguments['batch_size']}"
    whiskers = "\nmeans over runs of the median step; whiskers: standard deviation" * any(
        deviation for *_, deviation in bars
    )
    return finish(figure, handles, f"{title}\n{facts(hardware(run), [row.runs for _, row, _ in arms])}{whiskers}")


def _arms(runs, studies):
    """[(label, Row, its baseline Row), ...] from several studies, for the one model, data, batch size and hardware with
    the most arms, preferring a GPU. The baseline comes first, and only once."""
    places = {}
    for study in studies:
        found = groups(study, runs)
        for group in sorted(found, key=on_cpu):
            for row, base in (pace.timed(group, row, found) for row in group.rows):
                run = row.runs[0]
                if base is None or not base.runs[0].step_ms():
                    continue
                where = on_cpu(group), run.arguments["model"], run.data, run.arguments["batch_size"], str(hardware(run))
                arms = places.setdefault(where, {})
                name = "original" if row is base else in_words(row.arm.label)
                arms.setdefault(name, (name, row, base))
    found = min(places, key=lambda where: (where[0], -len(places[where])), default=None)
    return sorted(places.get(found, {}).values(), key=lambda arm: arm[1] is not arm[2])


def _bars(name, row, base):
    """[(label, {phase: length}, deviation of the step over the runs or None), ...] of an arm: host, and GPU if timed
    there. A length is the mean of the runs' medians, as in the tables."""
    on_cpu = row.runs[0].on_cpu
    scale = _medians(base.runs, "host")["step"].mean if on_cpu else 1.0
    bars = []
    for side, words in SIDES.items():
        medians = _medians(row.runs, side)
        if "step" in medians:
            lengths = {phase: sample.mean / scale for phase, sample in medians.items()}
            step = medians["step"]
            label = name if on_cpu else f"{name}, {words}"
            bars.append((label, lengths, step.deviation / scale if step.n > 1 else None))
    return bars


def _medians(runs, side):
    """{phase: the Sample of its median milliseconds over `runs`} for the phases that were timed on this side."""
    times = {}
    for timing in (run.timing() for run in runs if run.timed_epochs):
        for phase, found in timing["phases"].items():
            times.setdefault(phase, []).append((found[f"{side}_ms"] or {}).get("median"))
    samples = {phase: Sample.of(values) for phase, values in times.items()}
    return {phase: sample for phase, sample in samples.items() if sample}


def draw_memory(runs):
    """Memory against step time, both as multiples of the plain run's: a colour for each policy, whose name is next to
    its points, and a marker for each batch size."""
    found = groups(CHECKPOINTING, runs)
    group = min(found, key=on_cpu, default=None)
    if group is None:
        return None
    memory = Record.saved_mib if on_cpu(group) else Record.allocated_gb
    figure, panel = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    colours = distinct_colours(in_words(row.arm.label) for row in group.rows)
    markers = distinct_styles(group.rows, MARKERS)
    points, whiskers = {}, False
    for row in group.rows:
        base = group.baseline(row)
        multiples = base and [multiple(*pace.timed(group, row, found), Record.step_ms), multiple(row, base, memory)]
        if multiples and all(multiples):
            name, ((x, low, high), (y, *_)) = in_words(row.arm.label), multiples
            points.setdefault(name, []).append((x, y))
            panel.plot(x, y, markers[row.keys], color=colours[name], markersize=9)
            if low is not None and not row.arm.is_baseline:
                panel.errorbar(x, y, xerr=[[x - low], [high - x]], color=colours[name], linewidth=1, capsize=3)
                whiskers = True
    if not points:
        plt.close(figure)
        return None
    for name, of_policy in points.items():
        panel.plot(*zip(*of_policy, strict=True), color=colours[name], linewidth=1)
        panel.annotate(name, max(of_policy), xytext=(8, 6), textcoords="offset points")
    panel.margins(x=0.2)
    panel.set_xlabel("step time, × the plain run at the same batch size")
    what = "activation memory saved for backward" if on_cpu(group) else "peak allocated GPU memory"
    panel.set_ylabel(f"{what},\n× the plain run")
    panel.set_ylim(0, max(1.1, panel.get_ylim()[1]))
    title = figure_title("Memory against time", group) + "\nwhiskers: 95 % intervals" * whiskers
    return finish(figure, _key_handles(markers, "marker"), title)
