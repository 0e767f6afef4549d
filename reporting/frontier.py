"""The figure of benchmarks/memory.py: the memory that each way of checkpointing saves, against its cost."""

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from harness import shapes
from harness.shapes import TEXT, each, is_number, maybe
from reporting.figures import MARKERS, WIDTH
from reporting.records import provenance

# The start of a policy's name -> its family in the legend. Families with a line connect their budgets.
FAMILIES = {
    "budget held": "our plans for what is saved (--budget_of held)",
    "budget": "our plans for the peak (--memory_budget)",
    "compile": "torch.compile, activation_memory_budget",
    "torch.utils": "torch.utils.checkpoint, block by block",
    "nested": "the original study's nested scheme",
    "": "our policies, and plain",
}
WITH_LINE = ("budget held", "budget", "compile")
AS_COMPILE = "as compile"  # Our plans with as much memory as one of torch.compile's; only the latter is labelled.
RECORD = {"model": TEXT, "rows": each(list, {}), "training": maybe(each(list, {}))}
GAP = 10  # Points by which a name is moved up to avoid covering another.


def is_whole(record):
    """Whether a record has what the figure shows."""
    return shapes.fault(record, RECORD) is None and len(points(record, "rows", "share", "extra")) > 1


def points(record, table, x, y):
    """The rows of a record's `table`, a list of dicts, that have a policy and both figures: [(policy, x, y), ...]."""
    found = [(row.get("policy"), row.get(x), row.get(y)) for row in record.get(table) or ()]
    return [point for point in found if isinstance(point[0], str) and all(map(is_number, point[1:]))]


def draw(record):
    """The FLOPs recomputed against the memory saved for backward, and against the peak; then the time of steps against
    their peak, from the lowest to the highest round. Panels without data are left out. Our plans appear only where the
    axis is what their budget limits."""
    redone, on_peak = "FLOPs recomputed, % of forward and backward", "peak of activations and their gradients"
    trained = points(record, "training", "peak_share", "step_times_plain")
    allocated = any(row.get("peak_allocated_bytes") for row in record.get("training") or ())
    wanted = (
        (points(record, "rows", "share", "extra"), "budget", "activation memory saved for backward", redone),
        (peaks(record), "budget held", on_peak, redone),
        (trained, None, "peak memory allocated in a step" if allocated else on_peak, "time of a step, × plain"),
    )
    drawn = [panel for panel in wanted if len(panel[0]) > 1]
    height = 1 + 4.4 * len(drawn)
    figure, panels = plt.subplots(len(drawn), 1, figsize=(WIDTH, height), layout="constrained", squeeze=False)
    names = {}
    for panel, (rows, elsewhere, x, y) in zip(panels[:, 0], drawn, strict=True):
        kept = rows if len(drawn) < 3 else [row for row in rows if family(row[0]) != elsewhere]
        if y != redone:
            draw_spread(panel, record)
        draw_families(panel, kept)
        panel.set(xlabel=f"{x}, share of the plain run", ylabel=y)
        if y == redone:
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        names |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names, loc="outside lower center", ncols=2)
    facts = "; ".join(filter(None, [record["machine"]["hardware"], provenance([record])]))
    figure.suptitle(f"Memory against recomputation: {record['model']}\n{facts}", fontsize=11)
    keep_names_apart(figure, panels[:, 0])
    return figure


def peaks(record):
    """[(policy, peak as a share of the plain model's, FLOPs recomputed), ...]; [] if not known."""
    rows = points(record, "rows", "peak_bytes", "extra")
    plain = next((peak for policy, peak, _ in rows if policy == "plain"), None)
    return [(policy, peak / plain, extra) for policy, peak, extra in rows] if plain else []


def draw_families(panel, rows):
    """Draw [(policy, x, y), ...] with their names, and a line through each family of budgets."""
    colours = matplotlib.color_sequences["petroff10"]
    for index, (start, title) in enumerate(FAMILIES.items()):
        members = sorted((x, y, policy) for policy, x, y in rows if family(policy) == start)
        if not members:
            continue
        xs, ys, names = zip(*members, strict=True)
        line = "--" if start in WITH_LINE else "none"
        panel.plot(xs, ys, linestyle=line, marker=MARKERS[index], color=colours[index], markersize=8, label=title)
        for x, y, name in members:
            if AS_COMPILE not in name:
                shown = name.removeprefix("budget ").removeprefix("held ")
                panel.annotate(shown, (x, y), xytext=(5, 6), textcoords="offset points", fontsize=8)
    panel.set_xlim(0, 1.1)
    low, high = panel.get_ylim()
    panel.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))


def draw_spread(panel, record):
    """Whiskers from the lowest to the highest round, for the arms whose steps were timed."""
    for row in record["training"]:
        figures = [row.get(name) for name in ("peak_share", "step_low", "step_high")]
        if all(map(is_number, figures)):
            x, low, high = figures
            panel.plot([x, x], [low, high], color="black", linewidth=1, marker="_", zorder=1)


def keep_names_apart(figure, panels):
    """Move each name up until it covers none of those before it."""
    figure.canvas.draw()
    for panel in panels:
        boxes = []
        for text in panel.texts:
            while any(text.get_window_extent().overlaps(box) for box in boxes):
                text.xyann = (text.xyann[0], text.xyann[1] + GAP)
            boxes.append(text.get_window_extent())


def family(policy):
    return next(start for start in FAMILIES if policy.startswith(start))
