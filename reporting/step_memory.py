"""The figure of benchmarks/step_memory.py: the memory in use during one training step, over its time."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from harness import shapes
from harness.shapes import COUNT, NUMBER, TEXT, each
from reporting.figures import WIDTH
from reporting.records import provenance
from reporting.studies import in_words

GIB = 2**30
CURVE = {"backward_begins": COUNT, "ends": COUNT, "held_bytes": NUMBER, "points": each(list, each(list, COUNT))}
RECORD = {
    "model": TEXT, "batch_size": COUNT, "weight_bytes": COUNT, "kinds": each(list, TEXT), "steps": each(dict, CURVE),
}  # fmt: skip
ADAM = 3  # Weights, and two moments for each.
KINDS = {"passing": "temporary, freed at once", "redone": "recomputed for backward"}  # Their names in the legend.


def is_whole(record):
    """Whether a record has what the figure shows."""
    return shapes.fault(record, RECORD) is None and bool(record["steps"])


def draw(record):
    """A panel for each way to train, all on the same scale, with the kinds of memory stacked."""
    steps = record["steps"]
    shape = {"figsize": (WIDTH, 7.2), "layout": "constrained", "sharey": True, "squeeze": False}
    figure, panels = plt.subplots(-(-len(steps) // 2), 2, **shape)
    kinds = ["weights and Adam's moments", *(KINDS.get(kind, kind) for kind in record["kinds"])]
    colours = matplotlib.color_sequences["petroff10"]
    for panel, (name, step) in zip(panels.flat, steps.items(), strict=False):
        points = np.array(step["points"], dtype=float)
        base = np.full(len(points), ADAM * record["weight_bytes"])
        panel.stackplot(points[:, 0] / step["ends"], base / GIB, *(points[:, 1:].T / GIB), labels=kinds, colors=colours)
        panel.axvline(step["backward_begins"] / step["ends"], color="black", linestyle="--", linewidth=1)
        peak = (base + points[:, 1:].sum(1)).max() / GIB
        words = in_words("none" if name == "plain" else name)
        panel.set_title(f"{words}: {step['held_bytes'] / GIB:.2f} GiB kept, peak {peak:.2f} GiB", fontsize=10)
        panel.set_xlim(0, 1)
    for panel in panels[:, 0]:
        panel.set_ylabel("memory, GiB")
    for panel in panels[-1]:
        panel.set_xlabel("share of the step's operators executed")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    parts = [record["machine"]["hardware"], provenance([record]), "dashed line: backward begins"]
    facts = "; ".join(filter(None, parts))
    facts += "\na memory budget limits the peak of activations and their gradients, stacked here on the weights"
    title = f"Memory during one training step: {record['model']}, batch {record['batch_size']}"
    figure.suptitle(f"{title}\n{facts}", fontsize=11)
    return figure
