"""What README shows: what each technique adds to the time and memory of training, and how soon each gets where."""

import matplotlib.pyplot as plt
import numpy as np

from reporting import headline
from reporting.accuracy import target, timed_groups
from reporting.figures import STYLE, WIDTH, distinct_colours, facts, heading, save
from reporting.records import provenance

LESS, MORE = "#3f90da", "#e76300"  # Told apart by colour-blind readers, too; and they point to different sides.


def draw_waterfall(runs, folder):
    """Write `folder`/techniques.png; returns the paths written: [] where no run shows a technique."""
    found = headline.effects(runs)
    if not found:
        return []
    with plt.rc_context(STYLE):
        figure = draw(found)
    save(figure, folder / "techniques.png")
    plt.close(figure)
    return [folder / "techniques.png"]


def draw(effects):
    """Bars from 1, the run without the technique, to the multiple with it; whiskers are 95 % intervals."""
    places = list(dict.fromkeys(each.where for each in effects))
    names = [f"{headline.short(each)} [{places.index(each.where) + 1}]" for each in effects]
    notes = []
    for number, where in enumerate(places, 1):
        records = [run.record for each in effects if each.where == where for run in each.row.runs]
        n = sorted({each.n for each in effects if each.where == where})
        notes.append(f"[{number}] {where}; n = {' or '.join(map(str, n))}; {provenance(records)}")
    height = 1.4 + 0.36 * len(effects) + 0.19 * len(notes)
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained", sharey=True)
    for panel, key, title in zip(panels, ("time", "memory"), ("time of an epoch", "memory"), strict=True):
        for position, each in enumerate(effects):
            draw_bar(panel, position, getattr(each, key))
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel(f"{title}, × that of the run without it")
        panel.set_xlim(0, 1.25 * max(1.0, panel.get_xlim()[1]))
        panel.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(
        "What each technique adds to time and memory: left of the line is saved, right is paid", fontsize=11
    )
    figure.supxlabel("\n".join(notes), fontsize=8, x=0.01, ha="left")
    return figure


def draw_bar(panel, position, ratio):
    """One (multiple, low, high), or what is known of it, as a bar with whiskers and its number."""
    if ratio is None:
        return
    found, low, high = ratio
    panel.barh(position, found - 1, left=1, height=0.6, color=LESS if found < 1 else MORE)
    reach = max(1, found, high or 0)
    if low is not None and high > low:
        panel.plot([low, high], [position, position], color="black", linewidth=1.5, marker="|", markersize=7)
    panel.annotate(f"{found:.2f}", (reach, position), xytext=(6, 0), textcoords="offset points", va="center")


def draw_time_to_accuracy(runs, folder):
    """Write `folder`/time_to_accuracy.png: test accuracy by minutes, for each way the mean over its runs in a band from
    the lowest to the highest. Returns the paths written."""
    found = timed_groups(runs)
    if not found:
        return []
    group = max(found, key=lambda group: max(len(run.epochs) for row in group.rows for run in row.runs))
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
        colours = distinct_colours(row.arm.label for row in group.rows)
        for row in group.rows:
            minutes, values = by_epoch(row)
            colour = colours[row.arm.label]
            panel.plot(
                minutes, values.mean(0), color=colour, linewidth=2, marker="o", markersize=3, label=row.arm.label
            )
            panel.fill_between(minutes, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        goal = target(group)
        if goal is not None:
            panel.axhline(goal, color="grey", linestyle="--", linewidth=1)
            panel.annotate(f"{goal:.1f} %: what every run of the original's way reaches", (0, goal), xytext=(4, 4),
                           textcoords="offset points", color="grey")  # fmt: skip
        panel.set(xlabel="minutes since the run's start, with evaluation and saving", ylabel="test accuracy, %")
        panel.set_xlim(0, None)
        panel.legend(loc="lower right")
        figure.suptitle(f"Time to accuracy: {heading(group)}\n{facts(group)}", fontsize=11)
    save(figure, folder / "time_to_accuracy.png")
    plt.close(figure)
    return [folder / "time_to_accuracy.png"]


def by_epoch(row):
    """(mean minutes, test accuracy) by epoch over the runs of a Row: float [epochs] and [runs, epochs]."""
    curves = [run.accuracy_by_seconds() for run in row.runs]
    points = np.array([curve[: min(map(len, curves))] for curve in curves])
    return points[..., 0].mean(0) / 60, points[..., 1]
