"""report.py on folders of records: what it prints, skips, draws, and writes into a README."""

import json
import os
import re

import pytest
from conftest import ROOT
from run_records import make_record, make_run, read_table

from reporting import compare, overview, records
from reporting.records import Record

pytestmark = pytest.mark.slow


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
    (tmp_path / "runs" / "samples" / "train.settings.json").write_text("{}")
    (tmp_path / "runs" / "model").mkdir()
    (tmp_path / "runs" / "model" / "config.json").write_text("{}")
    return tmp_path / "runs"


def options(run_folder):
    return ["--benchmark_dir", run_folder.parent / "benchmarks"]


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
    folder = run_folder.parent / "benchmarks" / "cpu"
    folder.mkdir(parents=True)
    ratio = {"median": 12.34, "low": 11, "high": 13.5}
    record = {"benchmark": "rouge", "machine": {"hardware": "CPU"}, "results": {"titles": {"ratio": ratio}}}
    (folder / "rouge.json").write_text(json.dumps(record))
    rows = [{"policy": "none", "bytes": 2**21, "planned": False}]
    record |= {"benchmark": "memory", "results": {}, "rows": rows}  # Without what the figure needs.
    (folder / "memory.json").write_text(json.dumps(record))
    (folder / "broken.json").write_text("{")
    result = run_script("report.py", run_folder, *options(run_folder))
    headings = re.findall(r"^## (.*)", result.stdout, flags=re.MULTILINE)
    assert headings == [
        "Runs", "What each technique buys", "Loading images", "Half precision", "Recomputing activations",
        "Everything together", "Phases of a step", "Benchmarks", "Benchmark memory", "The original study",
    ]  # fmt: skip
    assert re.search(r"`rouge` \| titles \| 12.3 \| 11.0 to 13.5 \|", result.stdout)
    assert "| policy | saved, MiB | planned |" in result.stdout
    assert "| none | 2.00 | no |" in result.stdout
    assert "| resnext | resnext29_4x64d | cifar10 | 128 | 0 workers | fp32 |" in result.stdout
    skipped = [line for line in result.stderr.splitlines() if "skipped" in line]
    assert [line.split(":")[1].rpartition("/")[2] for line in skipped] == [
        "cut.json", "empty.json", "foreign.json", "hollow.json", "later.json", "broken.json",
    ]  # fmt: skip
    # Every figure that there are records for, beside the runs, not blank and not large.
    figures = sorted((run_folder / "image").iterdir())
    assert [path.stem for path in figures] == [
        "checkpointing_memory", "resnext_checkpointing", "resnext_data_loader", "resnext_mixed_precision",
        "resnext_together", "step_timeline", "techniques",
    ]  # fmt: skip
    for path in figures:
        assert 3_000 < path.stat().st_size < 100_000
        assert_drawn(path)


def assert_drawn(path):
    """At README width, with at least two colours besides black, white and greys."""
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
    assert "half.json: not valid JSON" in after.err
    kept = [row for row in section(before, "Runs") if row["Loading"] != "0 workers" and row["Precision"] != "bf16"]
    assert section(after.out, "Runs") == kept
    kept = [row for row in section(before, "Loading images") if row["Loading"] != "0 workers"]
    assert section(after.out, "Loading images") == kept
    assert len(kept) == 2
    assert "## Half precision" not in after.out  # One arm alone is no comparison.
    assert section(after.out, "Recomputing activations") == section(before, "Recomputing activations")


def test_only_some_tables(call_report, run_folder):
    output = call_report(run_folder, "--only", "checkpointing", "data-loader").out
    assert re.findall(r"^## (.*)", output, flags=re.MULTILINE) == ["Recomputing activations", "Loading images"]


def test_a_backend_that_matplotlib_does_not_know_is_none_of_ours(run_script, run_folder, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "foo")
    assert "techniques.png" in run_script("report.py", run_folder).stderr


def test_no_records_is_no_failure(call_report, tmp_path):
    (tmp_path / "runs").mkdir()
    result = call_report(tmp_path / "runs")
    assert "no runs found" in result.err
    assert "## The original study" in result.out


def test_figures_of_ones_own_runs_never_replace_the_repositorys(tmp_path):
    import report

    (tmp_path / "run.json").touch()
    assert report.beside([]) == report.ROOT / "runs"
    assert report.beside([tmp_path]) == report.beside([tmp_path / "run.json"]) == tmp_path


def test_a_missing_folder_is_one_line(run_script, tmp_path):
    result = run_script("report.py", tmp_path / "absent", code=2)
    assert len(result.stderr.splitlines()) == 1
    assert "absent" in result.stderr


def without(record, *path):
    """A copy of `record` that lacks the value at `path`, names and places."""
    record = json.loads(json.dumps(record))
    *way, last = path
    part = record
    for name in way:
        part = part[name]
    del part[last]
    return record


INTERVAL = {"mean": 0.3, "low": 0.2, "high": 0.4}
EVALUATION = {
    "format": 1, "experiment": "simcls_evaluation", "arguments": {}, "machine": {"hardware": "CPU"},
    "systems": {"generator": {"rouge1": INTERVAL}, "SimCLS": {"rouge1": INTERVAL}},
}  # fmt: skip
CHECKPOINTED = make_record(experiment="resnext_checkpoint", policy="chain")


def having(record, *path, value):
    """A copy of `record` that has `value` at `path`."""
    record = json.loads(json.dumps(record))
    *way, last = path
    part = record
    for name in way:
        part = part[name]
    part[last] = value
    return record


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        *((without(make_record(), "arguments", name), f"arguments has no {name}")
          for name in ("model", "dataset", "batch_size", "num_worker")),
        (without(CHECKPOINTED, "arguments", "policy"), "arguments has no policy"),
        (make_record(experiment="simcls"), "arguments has no num_workers"),
        (without(make_record(), "machine"), "it has no machine"),
        *((without(make_record(), "epochs", 1, "timing", name), f"epochs.1.timing has no {name}")
          for name in ("seconds", "steps", "warmup_steps", "unphased_seconds", "phases")),
        *((without(make_record(), "epochs", 1, "timing", "phases", "step", name), f"phases.step has no {name}")
          for name in ("count", "share", "host_ms", "device_ms")),
        *((without(make_record(), "epochs", 1, "timing", "phases", "step", "host_ms", name), f"host_ms has no {name}")
          for name in ("median", "p95", "total")),
        (without(make_record(), "arguments", "half_precision"), "arguments has no half_precision"),
        (without(EVALUATION, "systems", "SimCLS", "rouge1", "low"), "systems.SimCLS.rouge1 has no low"),
        # Of another program, or of a wrong type.
        ({"experiment": {"name": "x"}}, "unknown experiment {'name': 'x'}"),
        ({"experiment": ["resnext"], "format": 1}, "unknown experiment"),
        (having(make_record(), "epochs", value={"1": 2}), "epochs is not a list"),
        (having(make_record(), "epochs", 0, "loss", value="0.5"), "epochs.0.loss is not a number"),
        (having(make_record(), "epochs", 0, "timing", "seconds", value=0), "seconds is not a number above 0"),
        (having(make_record(), "epochs", 0, "timing", "phases", "step", "host_ms", value=1), "is not an object"),
        (having(make_record(), "epochs", 0, "timing", "peak_memory", value=8e9), "peak_memory is not an object"),
        (having(make_record(), "machine", "hardware", value={"cpu": 1}), "machine.hardware is not text"),
        (having(make_record(), "arguments", "batch_size", value="128"), "batch_size is not a whole number"),
        (having(make_record(), "epochs", 0, "test_acc", value=-1e308), "epochs.0.test_acc is not a percentage"),
        (having(make_record(), "saved_activation_bytes", value=True), "saved_activation_bytes is not a number"),
        (having(EVALUATION, "p_values", value={"x": {"rouge1": "small"}}), "p_values.x.rouge1 is not a number"),
    ],
)  # fmt: skip
def test_a_record_with_a_fault_is_named_with_it_and_left_out(tmp_path, capsys, record, reason):
    (tmp_path / "lacking.json").write_text(json.dumps(record))
    assert records.read_folders([tmp_path]) == ([], [])
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacking.json" in line
    assert reason in line


def test_what_may_be_null_is_as_if_it_were_absent():
    record = having(EVALUATION, "warnings", value=None)
    record["machine"] = dict.fromkeys(("hardware", "command", "commit", "date"))
    assert "unknown hardware" in overview.evaluations([record])
    simcls = make_record(experiment="simcls", num_workers=2, use_checkpoint=False, model_type=None, dataset=None)
    simcls["epochs"][0]["losses"] = None
    assert Record("a.json", simcls).losses() == []


def test_the_times_of_epochs_that_were_trained_elsewhere_are_left_out():
    record = make_record()
    for number, epoch in enumerate(record["epochs"], 1):
        epoch |= {"samples_per_second": 10.0 * number, "elapsed_seconds": 1.0 * number}
        epoch["timing"] |= {"seconds": 1.0 * number}
    assert Record("a.json", record).samples_per_second() == 25
    assert len(Record("a.json", record).accuracy_by_seconds()) == 3
    resumed = Record("a.json", record | {"epochs_elsewhere": 2})
    assert (resumed.samples_per_second(), resumed.epoch_seconds(), resumed.timing()["seconds"]) == (30, 3, 3)
    assert resumed.overall_seconds() is None
    assert resumed.accuracy_by_seconds() == []
    assert len(resumed.curve("loss")) == 3
    done = Record("a.json", record | {"epochs_elsewhere": 3})
    assert (done.timing(), done.epoch_seconds(), done.samples_per_second()) == (None, None, None)
    assert overview.step_phases([done]) == ""
    assert "resnext" in overview.every_run([done])
    assert "| 3 |" in overview.step_phases([Record("a.json", record)])  # Epochs tell rows apart.


def test_images_and_weights_of_one_name_are_not_taken_for_the_same(tmp_path):
    for number, (digest, place) in enumerate([("aaaaaaaa1", "1"), ("bbbbbbbb2", "1"), ("aaaaaaaa1", "2")]):
        record = make_record(dataset="folder", data_dir="images", init="run.pt")
        record |= {"data": {"digest": digest}, "places": {"init": place}}
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    table = read_table(overview.every_run(records.read_folders([tmp_path])[0]))
    assert [(each["Data"], each["init"]) for each in table] == [
        ("images (aaaaaaaa)", "run.pt (1)"), ("images (bbbbbbbb)", "run.pt (1)"), ("images (aaaaaaaa)", "run.pt (2)"),
    ]  # fmt: skip
    sides = [compare.read_side(tmp_path / f"{number}.json") for number in (0, 1)]
    assert compare.differing(sides) == [("images", "aaaaaaaa", "bbbbbbbb")]


def test_records_behind_links_are_found_and_folders_that_cannot_be_read_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/one.json").write_text(json.dumps(make_record()))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs/itself").symlink_to(tmp_path / "runs")
    assert len(records.read_folders([tmp_path / "runs"])[0]) == 1
    assert capsys.readouterr().err == ""
    walk = os.walk

    def refusing(folder, **more):  # Permissions do not stop root.
        more["onerror"](PermissionError(13, "Permission denied", f"{folder}/shut"))
        return walk(folder, **more)

    monkeypatch.setattr(os, "walk", refusing)
    records.read_folders([tmp_path / "runs"])
    assert "/runs/shut: Permission denied" in capsys.readouterr().err


def test_a_records_keys_may_stand_in_any_order_beside_a_models_files(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "simcls.json").write_text(json.dumps(make_record(), sort_keys=True))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    runs, _ = records.read_folders([tmp_path])
    assert [run.path.name for run in runs] == ["simcls.json"]
    assert "deep.json" in capsys.readouterr().err


def test_a_run_may_be_named_as_a_sample_is_and_a_folder_by_no_text(tmp_path, capsys):
    """A byte of a file's name that is no UTF-8 stands in the record as half a letter, which no font can draw."""
    (tmp_path / "0.json").write_text('{"article": "experiment"}')
    record = make_record(dataset="folder", data_dir="o\udcff \U0001f600")
    (tmp_path / "1.json").write_text(json.dumps(record))
    (run,), _ = records.read_folders([tmp_path])
    assert (run.path.name, run.data) == ("1.json", "o\ufffd \U0001f600")
    assert capsys.readouterr().err == ""


def test_the_report_goes_on_without_a_record_that_lacks_something(call_report, run_folder):
    before = call_report(run_folder).out
    (run_folder / "lacking.json").write_text(json.dumps(without(CHECKPOINTED, "arguments", "policy")))
    assert call_report(run_folder).out == before


def test_a_record_that_lacks_what_is_not_needed_is_shown(call_report, tmp_path):
    """What old versions did not write: flags that came later, the command, the versions."""
    old = without(make_record(), "arguments", "true_fp32")
    old = without(without(old, "arguments", "loader"), "machine", "versions")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old.json").write_text(json.dumps(old))
    (tmp_path / "runs" / "evaluation.json").write_text(json.dumps(EVALUATION))
    result = call_report(tmp_path / "runs")
    assert "skipped" not in result.err
    assert section(result.out, "Runs")[0]["Loading"] == "2 workers"
    assert section(result.out, "SimCLS before and after")[0]["ROUGE-1, %"] == "30.00 (20.00 to 40.00)"


def test_phases_of_one_record(run_script, run_folder):
    output = run_script("report.py", "--phases", run_folder / "resnext" / "gpu.json").stdout
    assert "| backward | 1155 | 30.00 | 45.00 | 35.10 | 60.00 | 90.00 | 70.20 | 54.0 |" in output


def test_a_record_counts_once_however_often_it_is_copied(run_folder, capsys):
    runs, evaluations = records.read_folders([run_folder, run_folder / "resnext"])
    assert len(runs) == 6
    assert evaluations == []
    capsys.readouterr()


def test_figures_are_the_same_bytes_for_the_same_records(tmp_path):
    from reporting.figures import draw_all

    runs = [make_run(seed=seed) for seed in range(2)] + [make_run(0.7, precision="fp16", half_precision="float16")]
    drawn = [draw_all(runs, {}, tmp_path / name) for name in ("one", "two")]
    names = ["techniques.png", "resnext_mixed_precision.png", "resnext_together.png", "step_timeline.png"]
    assert [path.name for path in drawn[0]] == names
    for one, two in zip(*drawn, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_only_readme_draws_over_the_committed_figures(run_script, tmp_path):
    errors = run_script("report.py", tmp_path, "--image_dir", ROOT / "image", code=2).stderr
    assert "--image_dir: only --readme draws in this repository's image/" in errors
