"""The figures, drawn from run records with matplotlib.

Times on a CPU appear as multiples of the baseline's step: they mean nothing away from the machine.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from harness.recording import atomic_write
from reporting.comparison import Sample
from reporting.overview import PHASES
from reporting.records import Run
from reporting.studies import CHECKPOINTING, DATA_LOADER, MIXED_PRECISION, SIMCLS
from reporting.tables import groups, hardware, place

WIDTH = 10  # Inches: 1,000 pixels, which README shows about as they are.
STYLE = {"font.size": 10, "figure.dpi": 100, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}
COLOURS = 128
CURVES = {"loss": "training loss", "acc": "training accuracy, %", "test_acc": "test accuracy, %"}
MARKERS = "osD^vP*X<>hd"


def draw_all(runs, folder):
    """Draw into `folder` every figure that `runs` have data for; returns the paths written."""
    pictures = {
        "resnext_data_loader": (draw_curves, DATA_LOADER, CURVES),
        "resnext_mixed_precision": (draw_curves, MIXED_PRECISION, CURVES),
        "resnext_checkpointing": (draw_curves, CHECKPOINTING, CURVES),
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


def chosen(study, runs):
    """The Group of a study that its figure shows: on a GPU before a CPU, then the one with most rows; or None."""
    found = groups(study, runs)
    return min(found, key=lambda group: group.rows[0].runs[0].on_cpu) if found else None


def label(row):
    return ", ".join([row.arm.label, *(f"batch {key}" for key in row.keys)])


def heading(group):
    return ", ".join(str(group.settings[name]) for name in ("model", "dataset") if name in group.settings)


def draw_curves(runs, study, curves):
    """Each of `curves`, key of an epoch -> axis label, by epoch: for each arm the mean over the seeds that all have."""
    group = chosen(study, [run for run in runs if run.curve("loss")])
    if group is None:
        return None
    seeds = set.intersection(*({run.arguments.get("seed") for run in row.runs} for row in group.rows))
    figure, panels = plt.subplots(1, len(curves), figsize=(WIDTH, 4.2), layout="constrained", squeeze=False)
    for panel, (key, title) in zip(panels[0], curves.items(), strict=True):
        for index, row in enumerate(group.rows):
            lines = [run.curve(key) for run in row.runs if not seeds or run.arguments.get("seed") in seeds]
            values = np.array([line[: min(map(len, lines))] for line in lines])
            epochs = np.arange(1, values.shape[1] + 1)
            panel.plot(epochs, values.mean(0), color=f"C{index}", linewidth=_width(index, group), label=label(row))
            if len(lines) > 1:
                panel.fill_between(epochs, values.min(0), values.max(0), color=f"C{index}", alpha=0.15, linewidth=0)
        panel.set(xlabel="epoch", ylabel=title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, panels[0, 0], f"{study.title}: {heading(group)}; {place(group.machine)}")


def _width(index, group):
    """Many techniques change no result: of equal lines the later are drawn thinner, on top."""
    return 1.2 + 6 * (1 - (index + 1) / len(group.rows))


def draw_losses(runs, study):
    """The training loss by update, a line for each run, the arms by colour."""
    group = chosen(study, [run for run in runs if run.losses()])
    if group is None:
        return None
    figure, panel = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    for index, row in enumerate(group.rows):
        for number, run in enumerate(row.runs):
            shown = {"label": label(row)} if number == 0 else {}
            panel.plot(*zip(*run.losses(), strict=True), color=f"C{index}", linewidth=_width(index, group), **shown)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set(xlabel="update", ylabel="training loss", ylim=(0, None))
    return _finish(figure, panel, f"{study.title}: training loss; {place(group.machine)}")


def _finish(figure, panel, title):
    """Put the title above and one legend, of what `panel` shows, below."""
    figure.get_layout_engine().set(w_pad=0.12)
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    figure.suptitle(title, fontsize=11)
    return figure


def draw_timeline(runs, studies):
    """The phases of a median step one after another; for each arm a row of host times and one of device times."""
    arms = _arms(runs, studies)
    bars = [bar for arm in arms for bar in _bars(*arm)]
    if not bars:
        return None
    figure, panel = plt.subplots(figsize=(WIDTH, 1.6 + 0.34 * len(bars)), layout="constrained")
    for position, (_, phases) in enumerate(bars):
        left = 0.0
        for index, name in enumerate(PHASES):
            shown = {"label": name} if position == 0 else {}
            panel.barh(position, phases.get(name, 0.0), left=left, color=f"C{index}", height=0.75, **shown)
            left += phases.get(name, 0.0)
    panel.set_yticks(range(len(bars)), [name for name, _ in bars])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    run = arms[0][1].runs[0]
    panel.set_xlabel("time, multiples of the baseline's step" if run.on_cpu else "time, ms")
    title = f"{run.arguments['model']}, batch {run.arguments['batch_size']}; {place(hardware(run))}"
    return _finish(figure, panel, f"One training step by phase: {title}")


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
            same = [*(run.arguments[name] for name in ("model", "dataset", "batch_size")), hardware(run)]
            if common in (None, same):
                common = same
                arms.append(("baseline" if row is base else row.arm.label, row, base))
    return arms


def _bars(name, row, base):
    """[(label, {phase: median length}), ...] of an arm: host, and device where it was timed."""
    timing, scale = row.runs[0].timing(), 1.0
    if row.runs[0].on_cpu:
        scale = base.runs[0].step_ms()
    bars = []
    for side in ("host", "device"):
        times = {phase: found[f"{side}_ms"] for phase, found in timing["phases"].items()}
        if all(times.values()):
            lengths = {phase: time["median"] / scale for phase, time in times.items() if time["median"] is not None}
            bars.append((f"{name}, {side}", lengths))
    return bars


def draw_memory(runs, study):
    """Memory against step time, both as multiples of the plain run's, a point for each policy and batch size."""
    group = chosen(study, runs)
    if group is None:
        return None
    on_cpu = group.rows[0].runs[0].on_cpu
    memory = Run.saved_mib if on_cpu else Run.allocated_gb
    figure, panel = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    for index, row in enumerate(group.rows):
        base = group.baseline(row)
        samples = [
            (Sample.of(map(value, row.runs)), base and Sample.of(map(value, base.runs)))
            for value in (Run.step_ms, memory)
        ]
        if all(new and old for new, old in samples):
            x, y = (new.mean / old.mean for new, old in samples)
            marker = MARKERS[index % len(MARKERS)]
            panel.plot(x, y, marker, color=f"C{index % 10}", markersize=9, label=label(row))
    panel.set_xlabel("step time, multiples of the plain run's at the same batch size")
    what = "bytes saved for backward" if on_cpu else "peak allocated GPU memory"
    panel.set_ylabel(f"{what},\nmultiples of the plain run's")
    panel.set_ylim(0, max(1.1, panel.get_ylim()[1]))
    return _finish(figure, panel, f"Memory against time: {heading(group)}; {place(group.machine)}")
