"""The figure of benchmarks/memory.py: what each way of checkpointing holds for backward, against what it redoes."""

import matplotlib.pyplot as plt

from reporting.benchmarks import by_hardware
from reporting.figures import MARKERS, STYLE, WIDTH, save

NAME = "memory-frontier.png"
FAMILIES = {  # The start of a policy's name -> what the legend calls its family.
    "budget": "our plans for a budget (--memory_budget)",
    "compile": "torch.compile, activation_memory_budget",
    "torch.utils": "torch.utils.checkpoint, block by block",
    "nested": "the original study's nested scheme",
    "": "our policies, and plain",
}


def draw_frontier(benchmark_folder, folder):
    """Write `folder`/memory-frontier.png from the record of the memory benchmark, one from a GPU before one from a CPU.

    Returns the paths written: [] when there is no record.
    """
    records = [record for group in by_hardware(benchmark_folder).values() for record in group]
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
    rows = record.get("rows")
    return bool(rows) and "model" in record and all({"policy", "share", "extra"} <= row.keys() for row in rows)


def draw(record):
    figure, panel = plt.subplots(figsize=(WIDTH, 5), layout="constrained")
    for index, (start, title) in enumerate(FAMILIES.items()):
        rows = [row for row in record["rows"] if family(row["policy"]) == start]
        if not rows:
            continue
        rows.sort(key=lambda row: row["share"])
        shares, extras = [row["share"] for row in rows], [100 * row["extra"] for row in rows]
        line = "--" if start in ("budget", "compile") else "none"
        panel.plot(shares, extras, linestyle=line, marker=MARKERS[index], color=f"C{index}", markersize=8, label=title)
        below = start == ""  # So that a policy and a budget that hold the same keep their names apart.
        for row, x, y in zip(rows, shares, extras, strict=True):
            name = row["policy"].removeprefix("budget ").removeprefix("compile ")
            if start not in ("torch.utils", "nested"):
                offset = (5, -13) if below else (5, 6)
                panel.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize=8)
    panel.set(
        xlabel="bytes held for backward, share of the plain run's",
        ylabel="FLOPs more, % of forward and backward",
        xlim=(0, 1.08),
    )
    panel.set_ylim(bottom=-0.1 * panel.get_ylim()[1])
    panel.legend()
    figure.suptitle(f"Memory against work: {record['model']}; {record['machine']['hardware']}", fontsize=11)
    return figure


def family(policy):
    return next(start for start in FAMILIES if policy.startswith(start))
