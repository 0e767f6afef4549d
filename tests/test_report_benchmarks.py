"""The tables and the figure that the report makes of benchmarks' records: hand-made ones, and the committed ones."""

import ast
import json

import pytest
from conftest import ROOT
from run_records import read_table

from reporting import benchmarks, figures, frontier

MIB = 2**20


def record_of(benchmark, device="cpu", **parts):
    hardware = {"cpu": "AMD EPYC, 2 cores", "cuda": "NVIDIA H100"}[device]
    return {"benchmark": benchmark, "machine": {"hardware": hardware, "device": device}} | parts


def ratio(median, **more):
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median} | more


@pytest.fixture
def read(tmp_path):
    """read(record, ...): what benchmarks.read gives of a folder with these records."""

    def read(*records):
        (tmp_path / "hardware").mkdir(exist_ok=True)
        for number, record in enumerate(records):
            (tmp_path / "hardware" / f"{number}.json").write_text(json.dumps(record))
        return benchmarks.read(tmp_path)

    return read


def targets_in_table(found):
    table = read_table(benchmarks.render(found))
    return {row["Case"]: (row.get("Target", "–"), row.get("Reached", "–")) for row in table}


@pytest.mark.parametrize(
    ("device", "interval", "expected"),
    [
        ("cpu", [1.5, 1.7], ("at least 1.5", "yes")),
        ("cpu", [1.4, 1.7], ("at least 1.5", "undecided")),
        ("cpu", [1.3, 1.4], ("at least 1.5", "no")),
        ("cpu", None, ("at least 1.5", "too few rounds")),
        ("cuda", [4.5, 4.9], ("at least 5", "no")),
        ("cuda", [5.0, 6.0], ("at least 5", "yes")),
    ],
)
def test_a_target_is_that_of_the_records_device_and_judged_by_the_interval(read, device, interval, expected):
    ratios = {"original": ratio(5.5, interval=interval), "published": ratio(9.0)}
    found = read(record_of("scorer_step", device, ratios=ratios))
    assert targets_in_table(found) == {"original": expected, "published": ("–", "–")}


@pytest.mark.parametrize(("high", "reached"), [(1.009, "yes"), (1.02, "undecided")])
def test_a_cost_is_to_be_low(read, high, reached):
    found = read(record_of("phase_overhead", results={"on over off": {"ratio": ratio(1.0, interval=[0.99, high])}}))
    (row,) = read_table(benchmarks.render(found))
    assert row["Case"] == "on over off (a cost)"
    assert (row["Target"], row["Reached"]) == ("at most 1.01", reached)


def test_a_benchmark_without_a_script_has_no_targets(read):
    (row,) = read_table(benchmarks.render(read(record_of("forgotten", ratio=ratio(2.0)))))
    assert row == {"Benchmark": "`forgotten`", "Ratio": "2.00", "Lowest to highest": "1.80 to 2.20"}


def test_every_case_with_a_target_is_in_the_table_of_the_committed_records():
    """A case that is renamed in a script would silently lose its target."""
    cases = {}
    for record in (each for records in benchmarks.read(ROOT / "benchmarks/results").values() for each in records):
        if record["benchmark"] != "fast":  # Its cases are made in tests/test_benchmarks_resnext.py.
            rows = benchmarks._ratio_rows(record)
            cases.setdefault(record["benchmark"], []).extend(row["Case"] for row in rows if row.get("Target"))
    assert "candidates" in cases
    for benchmark, found in cases.items():
        assert len(set(found)) == len(benchmarks._targets(benchmark).get("cpu", ())), benchmark


def test_targets_are_written_as_the_report_reads_them():
    for path in (ROOT / "benchmarks").glob("*.py"):
        names = [node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
        targets = benchmarks._targets(path.stem)
        assert bool(targets) == ("TARGETS" in names), path.name
        for device, of_device in targets.items():
            assert device in ("cpu", "cpu, bfloat16", "cuda")
            assert all(bound in ("at least", "at most") and limit > 0 for bound, limit in of_device.values())


MEMORY = {
    "model": "resnext29_4x64d",
    "batch_size": 4,
    "rows": [
        {"policy": "plain", "bytes": 200 * MIB, "share": 1.0, "extra": 0.0, "peak_bytes": 206 * MIB},
        {
            "policy": "budget 0.5", "bytes": 100 * MIB, "share": 0.496, "extra": 0.0132, "peak_bytes": None,
            "predicted_bytes": 99 * MIB, "predicted_peak_bytes": 115 * MIB,
        },
    ],
}  # fmt: skip
TRAINING = [
    {
        "policy": policy, "batch_size": 128, "precision": "tf32", "step_times_plain": time, "step_low": time - 0.01,
        "step_high": time + 0.01, "peak_allocated_bytes": 8000 * MIB, "peak_share": share, "largest_batch": 1024,
    }
    for policy, time, share in (("plain", 1.0, 1.0), ("budget 0.5", 1.12, 0.55))
]  # fmt: skip


def test_the_memory_tables_have_units_and_their_batch_sizes(read):
    text = benchmarks.render_tables(read(record_of("memory", "cuda", **MEMORY, training=TRAINING)), "memory")
    assert "Activation memory and recomputation: resnext29_4x64d, NVIDIA H100, batch 4:\n" in text
    assert read_table(text)[1] == {
        "policy": "budget 0.5", "saved, MiB": "100", "saved, % of plain": "49.6", "FLOPs recomputed, %": "1.32",
        "peak, MiB": "–", "predicted saved, MiB": "99.0", "predicted peak, MiB": "115",
    }  # fmt: skip
    assert "Training steps with recomputation: resnext29_4x64d, NVIDIA H100:\n" in text  # The batch is a column.
    assert read_table(text, 1)[1] == {
        "policy": "budget 0.5", "batch": "128", "precision": "tf32", "step, × plain": "1.12", "lowest": "1.11",
        "highest": "1.13", "peak allocated, MiB": "8000", "peak, % of plain": "55.0", "largest batch": "1024",
    }  # fmt: skip


def test_all_shares_of_the_memory_tables_are_percents(read):
    found = [{"policy": "budget 0.5", "extra": 0.05, "extra_found": 0.0701}]
    training = [row | {"saved_share": 0.25} for row in TRAINING]
    record = record_of("memory", **MEMORY, annealing=found, training=training, rounds=9)
    text = benchmarks.render_tables(read(record), "memory")
    assert "The planner against simulated annealing: " in text
    assert read_table(text, 1)[0]["FLOPs recomputed by annealing's plan, %"] == "7.01"
    assert read_table(text, 2)[0]["saved, % of plain"] == "25.0"
    assert text.count("n = 9 rounds") == 1  # Only steps were timed.


def test_the_limits_of_fast_are_a_table(read):
    limits = {"pflop_an_epoch": 1.27, "matmul_tflops_per_second": 390.5, "epoch_seconds": 9.25}
    text = benchmarks.render_tables(read(record_of("fast", model="resnext29_4x64d", limits=[limits])), "fast")
    assert read_table(text) == [
        {"PFLOP per epoch": "1.27", "matrix product, TFLOP/s": "390", "epoch, s": "9.25"},
    ]  # fmt: skip


def test_tables_through_the_command(run_script, read, tmp_path):
    read(record_of("memory", **MEMORY, training=TRAINING), record_of("fast", limits=[{"epoch_seconds": 2.0}]))
    (tmp_path / "runs").mkdir()
    output = run_script("report.py", tmp_path / "runs", "--benchmark_dir", tmp_path, "--image_dir", tmp_path / "image",
                        "--only", "benchmark-memory", "benchmark-fast").stdout  # fmt: skip
    assert "| budget 0.5 | 128 | tf32 | 1.12 |" in output
    assert "| epoch, s |" in output
    assert (tmp_path / "image" / "memory-frontier.png").is_file()


BROKEN = {
    "null": record_of("rouge", ratio=ratio(1.0) | {"median": None}),
    "text": record_of("rouge", ratio=ratio(1.0) | {"low": "1"}),
    "nan": record_of("rouge", results={"titles": ratio(1.0) | {"high": float("nan")}}),
    "interval": record_of("rouge", ratio=ratio(1.0, interval=[None, 1.0])),
    "list": [1],
    "no machine": {"benchmark": "rouge"},
    "no hardware": {"benchmark": "rouge", "machine": {"hardware": None}},
    "no benchmark": {"machine": {"hardware": "CPU"}},
    "names in a list": record_of(["rouge"]),
    "a device in a list": record_of("rouge", ratio=ratio(1.0)) | {"machine": {"hardware": "CPU", "device": ["cpu"]}},
    "pictures as text": record_of("fast", pictures="many", limits=[{"epoch_seconds": 2.0}]),
    "an interval as a number": record_of("rouge", ratio=ratio(1.0, interval=5)),
}


@pytest.mark.parametrize("record", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_named_and_left_out(read, capsys, record):
    found = read(record_of("rouge", ratio=ratio(12.0)), record)
    (line,) = capsys.readouterr().err.splitlines()
    assert "skipped" in line
    assert "1.json" in line
    assert [row["Ratio"] for row in read_table(benchmarks.render(found))] == ["12.0"]


@pytest.mark.parametrize(
    ("training", "panels"),
    [(None, 1), (TRAINING, 2), ([row | {"peak_share": None} for row in TRAINING], 1)],
    ids=["counted", "timed", "timed on a CPU"],
)
def test_the_frontier_has_a_panel_of_times_where_they_and_the_peaks_are_known(training, panels):
    figure = frontier.draw(record_of("memory", **MEMORY) | ({"training": training} if training else {}))
    assert len(figure.axes) == panels
    for panel in figure.axes:
        assert [text.get_text() for text in panel.texts] == ["0.5", "plain"]
    if panels == 2:
        *spread, budget, plain = (line.get_xydata().tolist() for line in figure.axes[1].lines)
        assert (budget, plain) == ([[0.55, 1.12]], [[1.0, 1.0]])
        assert spread[1] == [[0.55, 1.11], pytest.approx([0.55, 1.13])]  # The lowest round and the highest.


def test_the_frontier_has_a_panel_of_peaks_where_they_are_known():
    rows = [MEMORY["rows"][0], MEMORY["rows"][1] | {"peak_bytes": 103 * MIB}]
    figure = frontier.draw(record_of("memory", **MEMORY | {"rows": rows}))
    assert len(figure.axes) == 2
    budget, plain = figure.axes[1].lines
    assert (budget.get_xydata().tolist(), plain.get_xydata().tolist()) == ([[0.5, 0.0132]], [[1.0, 0.0]])
    assert "peak" in figure.axes[1].get_xlabel()


def test_names_in_the_frontier_lie_apart():
    """Of the committed record: no two names overlap."""
    path = next((ROOT / "benchmarks/results").glob("*/memory.json"), None)
    if path is None:
        pytest.skip("no record of benchmarks/memory.py is committed")
    figure = frontier.draw(json.loads(path.read_text()))
    figure.canvas.draw()
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) >= 5
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index]), panel.texts[index].get_text()


def test_a_gpus_record_is_drawn_before_a_cpus(tmp_path, monkeypatch):
    drawn, both = [], [record_of("memory", **MEMORY), record_of("memory", "cuda", **MEMORY)]
    monkeypatch.setattr(frontier, "draw", lambda record: drawn.append(record["machine"]["device"]))
    for records in (both, both[::-1]):
        figures.draw_all([], {"some": records}, tmp_path)
    assert drawn == ["cuda", "cuda"]
