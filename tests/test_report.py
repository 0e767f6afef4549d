"""The report on hand-made records: what is compared with what, the arithmetic, the README, the figures."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest

from harness.command_line import UserError
from reporting import comparison, overview, published, records, studies, tables
from reporting.comparison import Sample, number, quantity
from reporting.readme import rewrite
from reporting.records import Run, combine

PHASES = {"data load": 4.0, "forward": 30.0, "backward": 60.0, "optimizer": 6.0, "step": 100.0}
ARGUMENTS = {
    "num_worker": 2, "half_precision": None, "num_epoch": 3, "batch_size": 128, "lr": 0.01, "model": "resnext29_4x64d",
    "dataset": "cifar10", "data_dir": "data", "loader": "workers", "true_fp32": False, "seed": 0, "output_dir": "here",
    "resume": False, "max_steps": None, "processes": 1,
}  # fmt: skip
DATA_LOADER, MIXED_PRECISION, CHECKPOINTING = studies.DATA_LOADER, studies.MIXED_PRECISION, studies.CHECKPOINTING


def make_timing(scale=1.0, device="cuda", seconds=40.0):
    phases = {}
    for name, ms in PHASES.items():
        times = {"median": ms * scale, "p95": 1.5 * ms * scale, "total": 390 * ms * scale}
        host = {key: value / 2 for key, value in times.items()} if device == "cuda" else times
        share = times["total"] / (1e3 * seconds * scale)
        device_ms = times if device == "cuda" else None
        phases[name] = {"count": 385, "share": share, "host_ms": host, "device_ms": device_ms}
    return {
        "seconds": seconds * scale, "steps": 390, "warmup_steps": 5, "unphased_seconds": 0.5 * scale, "phases": phases,
        "peak_memory": {"allocated_bytes": int(8e9), "reserved_bytes": int(9e9)} if device == "cuda" else None,
    }  # fmt: skip


def make_record(scale=1.0, device="cuda", precision="tf32", experiment="resnext", saved=2**30, acc=90.0, **arguments):
    """A record in which times are `scale` times those of PHASES, and 40 s an epoch (50 s the first)."""
    hardware = {"cuda": "NVIDIA A100", "cpu": "AMD EPYC, 2 cores"}[device]
    epochs = [
        {
            "epoch": epoch, "loss": 1 / epoch, "acc": acc - 5 + epoch, "test_acc": acc - 3 + epoch,
            "samples_per_second": 1000 / scale, "timing": make_timing(scale, device, 50.0 if epoch == 1 else 40.0),
        }
        for epoch in (1, 2, 3)
    ]  # fmt: skip
    machine = {"device": device, "hardware": hardware, "threads": 2, "versions": {"torch": "2.13.0"}, "date": "today"}
    return {
        "format": 1, "experiment": experiment, "name": f"{experiment}_{precision}", "arguments": ARGUMENTS | arguments,
        "machine": machine, "precision": precision, "saved_activation_bytes": saved, "epochs": epochs,
    }  # fmt: skip


def make_run(*args, **changes):
    return Run(Path("record.json"), make_record(*args, **changes))


def read_table(markdown, number=0):
    """The `number`th table of a text as [{header: cell}, ...]."""
    blocks = re.findall(r"(?:^\|.*\n?)+", markdown, flags=re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[number].strip().split("\n")]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def rows_of(study, runs, **options):
    table = read_table(tables.render(study, runs, **options))
    return {row[study.arm_header]: row for row in table}


# ------------------------------------------------------------------------------------ arithmetic


def test_figures_of_a_run():
    run = make_run(scale=2.0)
    assert run.step_ms() == 200  # Of the device, not the 100 ms of the host.
    assert run.load_ms() == 8
    assert run.load_percent() == pytest.approx(4)
    assert run.epoch_seconds() == 80  # Without the first epoch's 100 s...
    assert run.overall_seconds() == 260  # ...which the whole has.
    assert run.allocated_gb() == 8
    assert run.reserved_gb() == 9
    assert run.saved_mib() == 1024
    assert run.activation_percent() == pytest.approx(100 * 2**30 / 8e9)
    assert make_run(device="cpu").step_ms() == 100
    assert make_run(device="cpu").allocated_gb() is None


def test_an_epoch_that_was_cut_short_is_no_epoch_time():
    record = make_record()
    record["epochs"][2]["timing"] |= {"steps": 10, "seconds": 1.0}  # Resumed in its middle.
    run = Run(Path("record.json"), record)
    assert run.epoch_seconds() == 40
    assert run.overall_seconds() is None
    record = make_record(max_steps=100)
    record["epochs"] = [{"epoch": 1, "timing": make_timing()}]  # What --max_steps leaves.
    assert Run(Path("record.json"), record).epoch_seconds() is None
    assert Run(Path("record.json"), record).step_ms() == 100


def test_combined_epochs():
    timings = [make_timing(1.0), make_timing(3.0), make_timing(5.0)]
    timings[2]["phases"]["step"] |= {"count": 0, "device_ms": {"median": None, "p95": None, "total": 100.0}}
    timings[1]["phases"]["step"]["count"] = 1000
    step = combine(timings)["phases"]["step"]
    assert step["count"] == 1385
    assert step["device_ms"]["median"] == 300  # 385 samples say 100, 1000 say 300.
    assert step["device_ms"]["total"] == 390 * 100 + 390 * 300 + 100
    assert step["share"] == pytest.approx(step["device_ms"]["total"] / 1e3 / combine(timings)["seconds"])
    assert combine([]) is None


def test_samples_and_noise():
    sample = Sample.of([1.0, None, 2.0, 3.0])
    assert (sample.mean, sample.deviation, sample.n) == (2.0, 1.0, 3)
    assert Sample.of([None]) is None
    one = Sample.of([5.0])
    assert comparison.within_noise(one, one) is None
    # Welch's t of these is 1.22 (4 degrees of freedom, p 0.29), and 12.2 (p 0.0003).
    assert comparison.within_noise(Sample.of([2.0, 3.0, 4.0]), sample)
    assert not comparison.within_noise(Sample.of([11.0, 12.0, 13.0]), sample)
    # One against three: t = d / (s sqrt(1 + 1/3)); 4.30 is the limit for 2 degrees of freedom.
    limit = 4.303 * np.sqrt(4 / 3)
    assert comparison.within_noise(Sample.of([2 + 0.99 * limit]), sample)
    assert not comparison.within_noise(Sample.of([2 + 1.01 * limit]), sample)
    assert comparison.ratio(Sample.of([2.0, 3.0, 4.0]), sample) == "1.50, within the noise"
    assert comparison.ratio(Sample.of([11.0, 12.0, 13.0]), sample) == "6.00"
    assert comparison.difference(Sample.of([1.0, 2.5]), sample) == "-0.2, within the noise"
    assert comparison.ratio(sample, None) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123456, "0.00123"),
        (1.6, "1.60"),
        (9.996, "10.0"),
        (104.2, "104"),
        (8934, "8930"),
        (-2.5, "-2.50"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_quantities():
    assert quantity(Sample.of([104.0])) == "104"
    assert quantity(Sample.of([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert quantity(Sample.of([97.14, 97.36]), places=1) == "97.2 ± 0.2"
    assert quantity(None) is None


# ------------------------------------------------------------------------- what is compared with what


def test_data_loader_table():
    runs = [make_run(), make_run(1.5, num_worker=0), make_run(0.9, loader="device"), make_run(1.0, num_worker=1)]
    rows = rows_of(DATA_LOADER, runs)
    assert list(rows) == ["2 workers (baseline)", "0 workers", "1 worker", "device"]
    assert rows["0 workers"]["Step, ms"] == "150"
    assert rows["0 workers"]["Step, ×"] == "1.50"
    assert rows["0 workers"]["Epoch, s"] == "60.0"
    assert rows["0 workers"]["A100: load, ms"] == "63"
    assert rows["device"]["A100: load, ms"] == "–"
    assert rows["device"]["Load, % of step"] == "4.0"


def test_mixed_precision_table():
    half = [make_run(0.7 + 0.01 * seed, precision="fp16", half_precision="float16", seed=seed) for seed in range(3)]
    rows = rows_of(MIXED_PRECISION, [make_run(), *half, make_run(1.6, precision="fp32", true_fp32=True)])
    assert list(rows) == ["tf32 (baseline)", "fp32", "fp16"]
    assert (rows["fp16"]["Runs"], rows["fp16"]["Step, ms"]) == ("3", "71.0 ± 1.0")
    assert rows["fp16"]["Step, ×"] == "0.71"
    assert rows["fp16"]["A100: overall, s"] == "6744"
    assert rows["fp32"]["A100: step, ms"] == "–"  # The original never ran it.


def test_checkpointing_table_has_a_baseline_for_each_batch_size():
    redo = {"experiment": "resnext_checkpoint", "memory_budget": None}
    runs = [
        make_run(),
        make_run(1.4, saved=2**29, policy="nested", **redo),
        make_run(1.1, saved=2**28, **(redo | {"policy": "chain", "memory_budget": 0.25})),
        make_run(4.0, saved=2**32, batch_size=512),
        make_run(4.4, saved=2**31, batch_size=512, policy="chain", **redo),
        make_run(9.0, saved=2**32, batch_size=896, policy="nested", **redo),
    ]
    table = read_table(tables.render(CHECKPOINTING, runs))
    rows = {(row["Batch size"], row["Redone in backward"]): row for row in table}
    assert list(rows) == [
        ("128", "none (baseline)"), ("128", "nested"), ("128", "budget 0.25"),
        ("512", "none (baseline)"), ("512", "chain"), ("896", "nested"),
    ]  # fmt: skip
    assert rows["128", "nested"]["Step, ×"] == "1.40"
    assert rows["128", "budget 0.25"]["Saved, ×"] == "0.25"
    assert rows["512", "chain"]["Step, ×"] == "1.10"  # Of the plain run at 512.
    assert rows["896", "nested"]["Step, ×"] == "–"  # There is none at 896.
    assert rows["896", "nested"]["A100: optimizer, ms"] == "560"
    assert rows["128", "none (baseline)"]["A100: memory, GB"] == "7.82"
    assert rows["128", "nested"]["Saved, % of peak"] == "6.7"


@pytest.mark.parametrize(
    "changes",
    [{"device": "cpu"}, {"model": "resnext29_2x16d"}, {"dataset": "digits"}, {"batch_size": 64}, {"lr": 0.1}],
)
def test_what_differs_elsewhere_is_not_compared(changes):
    """A slow run on other hardware, or of another model, data, batch or setting, is no baseline and no arm."""
    runs = [make_run(), make_run(0.5, num_worker=8), make_run(7.0, num_worker=0, **changes)]
    markdown = tables.render(DATA_LOADER, runs)
    assert [row["Loading"] for row in read_table(markdown)] == ["2 workers (baseline)", "8 workers"]
    assert "0 workers" not in markdown
    both = tables.render(DATA_LOADER, [*runs, make_run(3.5, **changes)])
    rows = [{row["Loading"]: row["Step, ×"] for row in read_table(both, number)} for number in range(2)]
    assert {"2 workers (baseline)": "1.00", "8 workers": "0.50"} in rows
    assert {"2 workers (baseline)": "1.00", "0 workers": "2.00"} in rows


def test_times_of_a_cpu_can_be_left_out():
    runs = [make_run(device="cpu"), make_run(1.5, device="cpu", num_worker=0)]
    everything, ratios = rows_of(DATA_LOADER, runs), rows_of(DATA_LOADER, runs, with_cpu_times=False)
    assert everything["0 workers"]["Step, ms"] == "150"
    assert "Step, ms" not in ratios["0 workers"]
    assert ratios["0 workers"]["Step, ×"] == "1.50"
    on_gpu = rows_of(DATA_LOADER, [make_run(), make_run(1.5, num_worker=0)], with_cpu_times=False)
    assert on_gpu["0 workers"]["Step, ms"] == "150"
    assert "Step, ms" not in overview.step_phases(runs, with_cpu_times=False)
    assert "Epoch, s" not in overview.every_run(runs, with_cpu_times=False)


def test_simcls_table():
    names = {"num_worker": None, "loader": None, "num_workers": 4, "use_checkpoint": False, "model_type": "demo"}
    runs = [
        make_run(experiment="simcls", **names),
        make_run(0.5, experiment="simcls", precision="fp16", **names | {"half_precision": "float16"}),
        make_run(1.2, saved=2**29, experiment="simcls", **names | {"use_checkpoint": True}),
        make_run(1.3, experiment="simcls", **names | {"num_workers": 0}),
    ]
    for run in runs:
        run.epochs[-1].update({"val_rouge1": 0.4, "val_rouge2": 0.2, "val_rougeL": 0.3})
    rows = rows_of(studies.SIMCLS, runs)
    assert list(rows) == ["4 workers (baseline)", "0 workers", "4 workers, fp16", "4 workers, recomputation"]
    assert rows["4 workers, fp16"]["Step, ×"] == "0.50"
    assert rows["4 workers, recomputation"]["Saved, ×"] == "0.50"
    assert rows["0 workers"]["Validation ROUGE, %"] == "30.0"


def test_the_originals_figures_stay_as_published():
    before = copy.deepcopy((published.DATA_LOADER, published.MIXED_PRECISION, published.CHECKPOINTING))
    table = read_table(overview.original_study())
    assert {row["Arm"]: row for row in table if row["Batch"] == "128"}["2 workers"] == {
        "Arm": "2 workers", "Batch": "128", "Load, ms": "1.6", "Optimizer, ms": "28", "Step, ms": "104",
        "Epoch, s": "44.5", "Overall, s": "8934", "Memory, GB": "7.82",
    }  # fmt: skip
    assert before == (published.DATA_LOADER, published.MIXED_PRECISION, published.CHECKPOINTING)


# -------------------------------------------------------------------------------- files and the command


@pytest.fixture
def run_folder(tmp_path):
    """Records of a baseline, two others, a GPU's, a copy; and files that are none."""
    folder = tmp_path / "runs" / "resnext"
    folder.mkdir(parents=True)
    made = {
        "baseline": make_record(device="cpu", precision="fp32"),
        "one_worker": make_record(1.1, device="cpu", precision="fp32", num_worker=1),
        "no_workers": make_record(1.5, device="cpu", precision="fp32", num_worker=0),
        "half": make_record(0.8, device="cpu", precision="bf16", half_precision="bfloat16"),
        "nested": make_record(
            1.4, device="cpu", precision="fp32", saved=2**29, experiment="resnext_checkpoint", policy="nested"
        ),
        "gpu": make_record(num_epoch=9),
        "copy": make_record(device="cpu", precision="fp32"),
    }
    for name, record in made.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    (folder / "cut.json").write_text(json.dumps(made["baseline"], indent=1)[:900])
    (folder / "empty.json").write_text("")
    (folder / "foreign.json").write_text('{"hello": 1}')
    (folder / "later.json").write_text(json.dumps(made["half"] | {"format": 99}))
    (folder / "hollow.json").write_text(json.dumps(made["half"] | {"epochs": [{"epoch": 1}]}))
    (tmp_path / "runs" / "samples").mkdir()
    (tmp_path / "runs" / "samples" / "12.json").write_text('{"article": []}')
    (tmp_path / "runs" / "model").mkdir()
    (tmp_path / "runs" / "model" / "config.json").write_text("{}")
    return tmp_path / "runs"


def options(run_folder):
    return ["--image_dir", run_folder.parent / "image", "--benchmark_dir", run_folder.parent / "benchmarks"]


@pytest.fixture
def call_report(monkeypatch, capsys):
    """call_report(folder, *arguments): report.py in this process; its .out and .err."""
    import report

    def call(run_folder, *arguments):
        words = [run_folder, *options(run_folder), *arguments]
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, words)])
        report.main()
        return capsys.readouterr()

    return call


def test_the_whole_report(run_script, run_folder):
    (run_folder.parent / "benchmarks" / "cpu").mkdir(parents=True)
    ratio = {"median": 12.34, "low": 11, "high": 13.5}
    record = {"benchmark": "rouge", "machine": {"hardware": "CPU"}, "results": {"titles": {"ratio": ratio}}}
    (run_folder.parent / "benchmarks" / "cpu" / "rouge.json").write_text(json.dumps(record))
    result = run_script("report.py", run_folder, *options(run_folder))
    headings = re.findall(r"^## (.*)", result.stdout, flags=re.MULTILINE)
    assert headings == [
        "Runs", "Data loader", "Mixed precision", "Activation checkpointing", "Phases of a step", "Benchmarks",
        "The original study", "What the figures mean",
    ]  # fmt: skip
    assert re.search(r"`rouge` \| fast_rouge.* \| titles \| 12.3 \| 11.0 to 13.5 \|", result.stdout)
    assert "| resnext | resnext29_4x64d | cifar10 | 128 | 0 workers | fp32 |" in result.stdout
    skipped = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert [line.split(":")[1].rpartition("/")[2] for line in skipped] == [
        "cut.json", "empty.json", "foreign.json", "hollow.json", "later.json",
    ]  # fmt: skip
    # Every figure that there are records for, not blank and not large.
    figures = sorted((run_folder.parent / "image").iterdir())
    assert [path.stem for path in figures] == [
        "checkpointing_memory", "resnext_checkpointing", "resnext_data_loader", "resnext_mixed_precision",
        "step_timeline",
    ]  # fmt: skip
    for path in figures:
        assert 3_000 < path.stat().st_size < 100_000
        assert_drawn(path)


def assert_drawn(path):
    """At README width, with at least three colours besides black, white and greys."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    assert picture.width == 1000
    colours = [colour for count, colour in picture.getcolors(1 << 20) if count > 30 and max(colour) - min(colour) > 60]
    assert len(colours) >= 2


def section(output, heading):
    return read_table(output.partition(f"## {heading}\n")[2])


def test_a_deleted_record_takes_its_row_and_nothing_else(call_report, run_folder):
    before = call_report(run_folder).out
    (run_folder / "resnext" / "no_workers.json").unlink()
    (run_folder / "resnext" / "half.json").write_bytes((run_folder / "resnext" / "cut.json").read_bytes())
    after = call_report(run_folder)
    assert "half.json: not whole JSON" in after.err
    kept = [row for row in section(before, "Runs") if row["Loading"] != "0 workers" and row["Precision"] != "bf16"]
    assert section(after.out, "Runs") == kept
    kept = [row for row in section(before, "Data loader") if row["Loading"] != "0 workers"]
    assert section(after.out, "Data loader") == kept
    assert len(kept) == 2
    assert "## Mixed precision" not in after.out  # One arm alone is no comparison.
    assert section(after.out, "Activation checkpointing") == section(before, "Activation checkpointing")


def test_no_records_is_no_failure(call_report, tmp_path):
    (tmp_path / "runs").mkdir()
    result = call_report(tmp_path / "runs")
    assert "no runs found" in result.err
    assert "## The original study" in result.out


def test_a_missing_folder_is_one_line(run_script, tmp_path):
    result = run_script("report.py", tmp_path / "absent", code=2)
    assert len(result.stderr.splitlines()) == 1
    assert "absent" in result.stderr


def test_phases_of_one_record(run_script, run_folder):
    output = run_script("report.py", "--phases", run_folder / "resnext" / "gpu.json").stdout
    assert "| backward | 1155 | 30.00 | 45.00 | 35.10 | 60.00 | 90.00 | 70.20 | 54.0 |" in output


def test_readme_is_rewritten_between_its_markers_only(call_report, run_folder, tmp_path):
    readme = tmp_path / "README.md"
    text = "# Title\n\n<!-- report:mixed-precision -->\nstale\n<!-- /report:mixed-precision -->\n\nBetween.\n"
    text += "\n<!-- report:simcls --><!-- /report:simcls -->\n"
    text += "Änd <!-- report:glossary -->\n<!-- /report:glossary -->!\r\n"
    readme.write_text(text, newline="")
    result = call_report(run_folder, "--readme", readme)
    first = readme.read_bytes()
    assert "left simcls in README.md as it is" in result.err
    call_report(run_folder, "--readme", readme)
    assert readme.read_bytes() == first
    new = first.decode()
    assert "stale" not in new
    assert "| bf16 | 1 | 0.80 |" in new
    assert "Step, ms" not in read_table(new)[0]  # No time of a CPU.
    # Without what lies between the markers it is as it was.
    inside = r"(<!-- report:(\S+) -->).*?(<!-- /report:\2 -->)"
    assert re.sub(inside, r"\1\3", new, flags=re.DOTALL) == re.sub(inside, r"\1\3", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!-- report:nothing -->\n<!-- /report:nothing -->", "names no table"),
        ("<!-- report:runs -->\ntext", "no partner"),
        ("text <!-- /report:runs -->", "no partner"),
        ("<!-- report:runs -->\n<!-- /report:phases -->", "no partner"),
        ("<!-- report:runs -->\n<!-- report:phases -->\n<!-- /report:phases -->\n<!-- /report:runs -->", "no partner"),
    ],
)
def test_wrong_markers_leave_the_readme_alone(tmp_path, text, reason):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(UserError, match=reason):
        rewrite(readme, {"runs": "new", "phases": "new"})
    assert readme.read_text() == text


def test_a_record_counts_once_however_often_it_is_copied(run_folder, capsys):
    runs, evaluations = records.read_folders([run_folder, run_folder / "resnext"])
    assert len(runs) == 6
    assert evaluations == []
    capsys.readouterr()


def test_figures_are_the_same_bytes_for_the_same_records(tmp_path):
    from reporting.figures import draw_all

    runs = [make_run(seed=seed) for seed in range(2)] + [make_run(0.7, precision="fp16", half_precision="float16")]
    drawn = [draw_all(runs, tmp_path / name) for name in ("one", "two")]
    assert [path.name for path in drawn[0]] == ["resnext_mixed_precision.png", "step_timeline.png"]
    for one, two in zip(*drawn, strict=True):
        assert one.read_bytes() == two.read_bytes()
