"""The figure of benchmarks/memory.py: the memory that each way of checkpointing saves, against what that costs."""

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from reporting.figures import MARKERS, STYLE, WIDTH, save
from reporting.records import provenance
from reporting.shapes import is_number

NAME = "memory-frontier.png"
FAMILIES = {  # The start of a policy's name -> what the legend calls its family.
    "budget": "our plans for a budget (--memory_budget)",
    "compile": "torch.compile, activation_memory_budget",
    "torch.utils": "torch.utils.checkpoint, block by block",
    "nested": "the original study's nested scheme",
    "": "our policies, and plain",
}
# Where names stand, in points from theirs, so that those of different families keep apart where their points meet.
ABOVE_RIGHT, BELOW_RIGHT, BELOW_LEFT = ({"xytext": (5, 6)}, {"xytext": (5, -13)}, {"xytext": (-5, -13), "ha": "right"})
PLACES = {"": BELOW_RIGHT, "compile": BELOW_LEFT}


def draw_frontier(found, folder):
    """Write `folder`/memory-frontier.png from the record of the memory benchmark, one from a GPU before one from a CPU.

    found: the benchmarks' records, as reporting.benchmarks.read gives them. Returns the paths written: [] when there
    is no such record.
    """
    records = [record for group in found.values() for record in group]
    records = [record for record in records if record["benchmark"] == "memory" and is_whole(record)]
    if not records:
        return []
    record = min(records, key=lambda record: record["machine"].get("device") == "cpu")
    with plt.rc_context(STYLE):
        figure = draw(record)
    save(figure, folder / NAME)
    plt.close(figure)
    return [folder / NAME]


def is_whole(record):
    """Whether a record has what the figure shows."""
    return "model" in record and len(points(record, "rows", "share", "extra")) > 1


def points(record, table, x, y):
    """The rows of a record's `table`, a list of dicts, that have a policy and both figures: [(policy, x, y), ...]."""
    rows = record[table] if isinstance(record.get(table), list) else []
    found = [(row.get("policy"), row.get(x), row.get(y)) for row in rows if isinstance(row, dict)]
    return [point for point in found if isinstance(point[0], str) and all(map(is_number, point[1:]))]


def draw(record):
    """The FLOPs recomputed against the memory that is saved, and against the peak; then the time of steps against
    theirs. What the record does not know has no panel."""
    redone = "FLOPs recomputed, of those of forward and backward"
    wanted = (
        (points(record, "rows", "share", "extra"), "activation memory saved for backward, share of plain", redone),
        (peaks(record), "peak of activations and their gradients, share of plain", redone),
        (
            points(record, "training", "peak_share", "step_times_plain"),
            "peak memory allocated in a step, share of plain",
            "time of a step, × plain",
        ),
    )
    drawn = [panel for panel in wanted if len(panel[0]) > 1]
    height = 1 + 4.4 * len(drawn)
    figure, panels = plt.subplots(len(drawn), 1, figsize=(WIDTH, height), layout="constrained", squeeze=False)
    for panel, (rows, x, y) in zip(panels[:, 0], drawn, strict=True):
        draw_families(panel, rows)
        panel.set(xlabel=x, ylabel=y)
        if y == redone:
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    facts = f"{record['machine']['hardware']}; {provenance([record])}"
    figure.suptitle(f"Memory against work: {record['model']}\n{facts}", fontsize=11)
    return figure


def peaks(record):
    """[(policy, peak as a share of the plain model's, FLOPs recomputed), ...]; [] when that is not known."""
    rows = points(record, "rows", "peak_bytes", "extra")
    plain = next((peak for policy, peak, _ in rows if policy == "plain"), None)
    return [(policy, peak / plain, extra) for policy, peak, extra in rows] if plain else []


def draw_families(panel, rows):
    """Draw [(policy, x, y), ...] with their names, and a line through each family of budgets."""
    colours = matplotlib.color_sequences["petroff10"]
    for index, (start, title) in enumerate(FAMILIES.items()):
        # In the record's order, from budget to budget: a plan that saves less may have the higher peak.
        members = [(x, y, policy) for policy, x, y in rows if family(policy) == start]
        if not members:
            continue
        xs, ys, names = zip(*members, strict=True)
        line = "--" if start in ("budget", "compile") else "none"
        panel.plot(xs, ys, linestyle=line, marker=MARKERS[index], color=colours[index], markersize=8, label=title)
        for x, y, name in members:
            place = PLACES.get(start, ABOVE_RIGHT)
            panel.annotate(name.removeprefix("budget "), (x, y), textcoords="offset points", fontsize=8, **place)
    panel.set_xlim(0, 1.1)
    low, high = panel.get_ylim()
    panel.set_ylim(low - 0.08 * (high - low), high + 0.04 * (high - low))


def family(policy):
    return next(start for start in FAMILIES if policy.startswith(start))
