"""A comparison of two runs, or of two folders of runs that differ only in their seed."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from harness.endings import UserError
from reporting.comparison import Sample, quantity, ratio_with_interval, within_noise
from reporting.figures import STYLE, WIDTH, arm_handles, distinct_colours, draw_band, save, stacked
from reporting.named import read_runs
from reporting.overview import PHASES, by_place
from reporting.records import Record
from reporting.tables import hardware, markdown, place, settings

RESULTS = {"loss": "Training loss", "acc": "Training accuracy, %", "test_acc": "Test accuracy, %"}
NOISE = {True: "within the noise", False: "beyond the noise", None: "unknown: too few runs"}


def read_side(path):
    """The Records at `path`: of one run (its .json, or a file next to it such as its .pt), or of a folder with runs of
    one set-up. UserError if there is none, or if there are several set-ups."""
    set_ups = [repeats for _, rows in by_place(read_runs(path)) for repeats in rows]
    if not set_ups:
        raise UserError(f"{path} has no record of a training run; choose a run's .json, or a folder of them")
    if len(set_ups) > 1:
        names = ", ".join(each[0].path.name for each in set_ups)
        raise UserError(f"{path} has runs of {len(set_ups)} set-ups; choose one of them: {names}")
    return set_ups[0]


def names(sides):
    """ "A: the name of its first run, n = 3" for each side, with the folder if both have the same name."""
    shown = [side[0].name for side in sides]
    if shown[0] == shown[1]:
        shown = [f"{side[0].path.absolute().parent.name}/{side[0].name}" for side in sides]
    return [f"{letter}: {name}, n = {len(side)}" for letter, name, side in zip("AB", shown, sides, strict=True)]


def render(sides):
    """Markdown: what the sides differ in, then their figures, the ratio, and whether the difference is noise."""
    rows = [dict(zip(("Setting", "A", "B"), cells, strict=True)) for cells in differing(sides)]
    parts = ["  \n".join(names(sides)), markdown(rows) if rows else "No setting except the seed differs."]
    if hardware(sides[0][0]) != hardware(sides[1][0]):
        parts.append("They ran on different hardware, threads or versions: compare their results, not their times.")
    return "\n\n".join([*parts, markdown([_cells(*row) for row in figures(sides)])])


def differing(sides):
    """[(name, value in A, value in B), ...] as text: the arguments, precision, hardware and commit that differ."""
    facts = []
    for run in (side[0] for side in sides):
        what = {"precision": run.precision, "loading": run.record.get("loading"), "images": run.images}
        facts.append(settings(run) | what | {"runs on": place(hardware(run)), "commit": run.machine.get("commit")})
    keys = dict.fromkeys(name for each in facts for name in each)
    values = [(name, *(_text(each.get(name)) for each in facts)) for name in keys]
    return [row for row in values if row[1] != row[2]]


def _text(value):
    return "–" if value is None else str(value)


def figures(sides):
    """[(what, Sample of A or None, Sample of B or None), ...]: times by phase, memory, results."""
    phases = {name.capitalize() + ", ms": (lambda run, name=name: run.phase_ms(name)) for name in PHASES}
    wanted = phases | {
        "Step, ms": Record.step_ms,
        "Epoch, s": Record.epoch_seconds,
        "Samples/s": Record.samples_per_second,
        "Peak memory, GB": Record.allocated_gb,
        "Saved for backward, MiB": Record.saved_mib,
    }
    wanted |= {title: (lambda run, key=key: run.last(key)) for key, title in RESULTS.items()}
    found = [(what, *(Sample.over(side, figure) for side in sides)) for what, figure in wanted.items()]
    return [row for row in found if row[1] or row[2]]


def _cells(what, old, new):
    cells = {"Figure": what, "A": quantity(old), "B": quantity(new)}
    if old and new:
        cells |= {"B / A": ratio_with_interval(new, old)}
        cells |= {"Difference": "none" if old.mean == new.mean else NOISE[within_noise(new, old)]}
    return cells


def draw(sides, path):
    """Write the figure: the phases of a median step, and the curves, each with a band over the runs. Returns `path`."""
    both = names(sides)
    colours = distinct_colours(both)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 4.2), layout="constrained")
        for index, (name, side) in enumerate(zip(both, sides, strict=True)):
            _draw_phases(panels[0], index, side, colours[name])
            for panel, key in zip(panels[1:], ("loss", "test_acc"), strict=True):
                curves = [run.curve(key) for run in side if run.curve(key)]
                _draw_curve(panel, curves, colours[name], "-" if index == 0 else "--")
        panels[0].set_xticks(range(len(PHASES)), PHASES, rotation=45, ha="right")
        panels[0].set_ylabel("median in a step, ms")
        for panel, title in zip(panels[1:], ("training loss", "test accuracy, %"), strict=True):
            panel.set(xlabel="epoch", ylabel=title)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(handles=arm_handles(colours), loc="outside lower center", ncols=1)
        figure.suptitle("; ".join(dict.fromkeys(place(hardware(side[0])) for side in sides)), fontsize=11)
    return save(figure, path)


def _draw_phases(panel, index, side, colour):
    for position, name in enumerate(PHASES):
        sample = Sample.of(run.phase_ms(name) for run in side)
        if sample:
            panel.bar(position + 0.4 * index - 0.2, sample.mean, 0.4, color=colour, yerr=sample.deviation or None)


def _draw_curve(panel, curves, colour, line):
    if not curves:
        return
    values = stacked(curves)
    epochs = np.arange(1, values.shape[1] + 1)
    draw_band(panel, epochs, values, colour, linewidth=2, linestyle=line, marker="." if len(epochs) < 30 else None)
