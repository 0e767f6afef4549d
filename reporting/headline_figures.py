"""The README's figures: the effect of each technique on training time and memory, and how soon each way reaches an
accuracy."""

import textwrap

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from reporting import pace
from reporting.accuracy import races
from reporting.figures import WIDTH, arm_handles, distinct_colours, draw_band, figure_title, finish, stacked
from reporting.records import provenance
from reporting.studies import in_words
from reporting.tables import is_toy

LESS, MORE = "#3f90da", "#e76300"  # Distinguishable for colour-blind readers; the bars also differ in direction.
ROW, AROUND, LINE = 0.36, 0.42, 0.15  # Inches: a technique, the line above those of one place, and each further line.
WIDEST = 125  # Characters in such a line.


def draw(effects):
    """Bars from 1, the run without the technique, to the multiple with it; whiskers are 95 % intervals. One row of
    panels per place of measurement, all on the same scale."""
    places = {}
    for each in effects:
        places.setdefault(each.where, []).append(each)
    rows = [(textwrap.fill(place_line(where, found), WIDEST), found) for where, found in places.items()]
    heights = [AROUND + ROW * len(found) + LINE * line.count("\n") for line, found in rows]
    figure, panels = plt.subplots(
        len(places), 2, figsize=(WIDTH, 1.1 + sum(heights)), layout="constrained", sharex="col", sharey="row",
        squeeze=False, height_ratios=heights,
    )  # fmt: skip
    for row, (line, found) in zip(panels, rows, strict=True):
        for panel, key in zip(row, ("time", "memory"), strict=True):
            for position, each in enumerate(found):
                draw_bar(panel, position, getattr(each, key))
            panel.axvline(1, color="black", linewidth=1)
            panel.grid(axis="y", visible=False)
        row[0].set_yticks(range(len(found)), [short(each) for each in found])
        row[0].set_ylim(len(found) - 0.4, -0.6)
        row[0].set_title("\n" * line.count("\n") + " ", fontsize=9)  # Room for the line, which is wider than the panel.
        title = row[0].annotate(line, (0, 1), xycoords=("figure fraction", "axes fraction"),
                                xytext=(6, 5), textcoords="offset points", fontsize=9)  # fmt: skip
        title.set_in_layout(False)
    for panel, title in zip(panels[-1], ("epoch time", "memory"), strict=True):
        panel.set_xlabel(f"{title}, × the run without it")
        panel.set_xlim(0, 1.2 * max(1.0, panel.get_xlim()[1]))
    figure.suptitle(
        "Time and memory with each technique, relative to the run without it: left of the line is less, right is more\n"
        "bars: means over seeds; whiskers: 95 % intervals where there are several", fontsize=11,
    )  # fmt: skip
    return figure


def short(effect):
    """The technique in a few words."""
    label = effect.label.removeprefix("4 workers, ") if effect.study == "simcls" else effect.label
    return f"SimCLS: {in_words(label)}" if effect.study == "simcls" else in_words(label)


def place_line(where, effects):
    """ "resnext29_2x4d, CIFAR-10, 15 epochs; AMD EPYC, ...; n = 3; commit 1f098ca, 2026-11-25" for a row of panels."""
    n = sorted({each.n for each in effects})
    made = provenance([run.record for each in effects for run in each.runs()])
    return "; ".join(filter(None, [where, f"n = {' or '.join(map(str, n))}", made]))


def draw_bar(panel, position, ratio):
    """One (multiple, low, high), as far as known, as a bar with whiskers and its number."""
    if ratio is None:
        return
    found, low, high = ratio
    panel.barh(position, found - 1, left=1, height=0.6, color=LESS if found < 1 else MORE)
    reach = max(1, found, high or 0)
    if low is not None and high > low:
        panel.plot([low, high], [position, position], color="black", linewidth=1.5, marker="|", markersize=7)
    panel.annotate(f"{found:.2f}", (reach, position), xytext=(6, 0), textcoords="offset points", va="center")


def draw_time_to_accuracy(runs):
    """Test accuracy over minutes: for each way the mean over its runs, with a band from the lowest to the highest; None
    if no runs can be compared in this way."""
    # Real images first, if there are any; among those the longest runs.
    race = min(races(runs), key=lambda race: (is_toy(race.group), -pace.epochs(race.group)), default=None)
    if race is None:
        return None
    ways = [way for way in race.ways if all(way.curves)]
    figure, panel = plt.subplots(figsize=(WIDTH, 4.6), layout="constrained")
    colours = distinct_colours(in_words(way.row.arm.label) for way in ways)
    for way in ways:
        points = stacked(way.curves)  # [runs, epochs, (seconds, accuracy)]
        style = {"linewidth": 2, "marker": "o", "markersize": 3}
        draw_band(panel, points[..., 0].mean(0) / 60, points[..., 1], colours[in_words(way.row.arm.label)], **style)
    handles, goal = arm_handles(colours), race.target
    if goal is not None:
        style = {"color": "black", "linestyle": "--", "linewidth": 1}
        panel.axhline(goal, **style)
        handles.append(Line2D([], [], label=f"{goal:.1f} %, reached by every run of the original", **style))
    panel.set(xlabel="minutes since the start of the run, including evaluation and saving", ylabel="test accuracy, %")
    panel.set_xlim(0, None)
    return finish(figure, handles, figure_title("Time to accuracy", race.group, banded=True))
