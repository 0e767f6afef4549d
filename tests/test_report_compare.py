"""report.py --compare and --phases, and what it prints on a terminal."""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
from run_records import make_record, make_run, read_table

from harness.endings import UserError
from reporting import compare, overview, tables, terminal
from reporting.comparison import interval_text
from reporting.studies import CHECKPOINTING, DATA_LOADER


@pytest.fixture
def folders(tmp_path):
    """a: two seeds of the plain run; b: three of a slower one, as exact, with less memory."""
    for seed, scale in enumerate((1.0, 1.02)):
        write(tmp_path / "a" / f"a{seed}.json", make_record(scale, seed=seed, acc=80 + seed))
    block = {"experiment": "resnext_checkpoint", "policy": "block", "saved": 2**28}
    for name, seed, scale, acc in (("b0", 0, 1.49, 80.5), ("b1", 1, 1.53, 80.9), ("b2", 2, 1.48, 82.5)):
        write(tmp_path / "b" / f"{name}.json", make_record(scale, seed=seed, acc=acc, **block))
    return tmp_path


def write(path, record):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))


def test_two_folders_of_seeds_side_by_side(run_script, folders):
    result = run_script("report.py", "--compare", folders / "a", folders / "b")
    assert "n = 2" in result.stdout
    assert "n = 3" in result.stdout
    assert read_table(result.stdout) == [
        {"Setting": "experiment", "A": "resnext", "B": "resnext_checkpoint"},
        {"Setting": "policy", "A": "–", "B": "block"},
    ]
    rows = {row["Figure"]: row for row in read_table(result.stdout, 1)}
    assert rows["Step, ms"]["B / A"].startswith("1.49 (")  # Of the two seeds that both have.
    assert rows["Step, ms"]["Difference"] == "beyond the noise"
    assert rows["Saved for backward, MiB"]["B / A"] == "0.25"
    assert rows["Test accuracy, %"]["Difference"] == "within the noise"
    assert rows["Training loss"]["Difference"] == "none"
    assert (folders / "b" / "image" / "compare.png").stat().st_size > 3_000


def test_a_run_may_be_named_by_its_weights_and_has_no_noise(folders):
    (folders / "a" / "a0.pt").touch()
    sides = [compare.read_side(folders / "a" / "a0.pt"), compare.read_side(folders / "a" / "a1.json")]
    rows = {row["Figure"]: row for row in read_table(compare.render(sides))}
    assert rows["Step, ms"]["Difference"] == "unknown: too few runs"
    assert "No setting except the seed differs" in compare.render(sides)


def test_of_a_seed_that_was_run_again_the_latest_is_compared(folders):
    old = make_record(9.0, seed=2, experiment="resnext_checkpoint", policy="block", saved=2**28)
    old["machine"]["date"] = "2025-01-01T00:00:00Z"
    write(folders / "b" / "b2_again.json", old)
    assert [run.path.name for run in compare.read_side(folders / "b")] == ["b2.json", "b0.json", "b1.json"]


def test_the_figure_has_the_phases_of_a_step_then_the_loss_and_the_test_accuracy(folders, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    compare.draw([compare.read_side(folders / name) for name in "ab"], folders / "compare.png")
    phases, loss, accuracy = plt.gcf().axes
    heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in phases.patches}
    names = [label.get_text() for label in phases.get_xticklabels()]
    backward, optimizer = (names.index(name) for name in ("backward", "optimizer"))
    assert [heights[backward + place] for place in (-0.2, 0.2)] == pytest.approx([60 * 1.01, 60 * 1.5])
    assert [heights[optimizer + place] for place in (-0.2, 0.2)] == pytest.approx([6 * 1.01, 6 * 1.5])
    assert [line.get_ydata().tolist() for line in loss.lines] == [pytest.approx([1, 1 / 2, 1 / 3])] * 2
    first, second = (line.get_ydata().tolist() for line in accuracy.lines)
    assert (first, second) == (pytest.approx([78.5, 79.5, 80.5]), pytest.approx([79.3, 80.3, 81.3]))


def test_what_cannot_be_compared_is_one_line(folders):
    write(folders / "a" / "other.json", make_record(num_worker=7))
    with pytest.raises(UserError, match="2 set-ups; choose one of them: a0.json, other.json"):
        compare.read_side(folders / "a")
    (folders / "empty").mkdir()
    with pytest.raises(UserError, match="no record of a training run"):
        compare.read_side(folders / "empty")


def test_another_machine_is_told(folders):
    write(folders / "cpu.json", make_record(device="cpu"))
    sides = [compare.read_side(folders / name) for name in ("a/a0.json", "cpu.json")]
    assert "different hardware" in compare.render(sides)


def test_phases_of_a_folder_name_the_run_or_list_them(run_script, folders):
    output = run_script("report.py", "--phases", folders / "a" / "a0.json").stdout
    assert "a0.json, 3 epochs:" in output
    said = run_script("report.py", "--phases", folders / "b", code=2).stderr
    assert "has 3 runs; choose one: b0.json, b1.json, b2.json" in said


def test_tables_on_a_terminal_are_aligned():
    table = tables.markdown([{"Name": "a | b `<c>`", "Value": "10.5"}, {"Name": "long name", "Value": None}])
    assert "| a \\| b `&lt;c>` | 10.5 |" in table
    assert terminal.aligned(f"Before:\n\n{table}\n\nafter").splitlines() == [
        "Before:", "", "Name       Value", "---------  -----", "a | b <c>   10.5", "long name      –", "", "after",
    ]  # fmt: skip


def test_a_table_that_is_wider_than_the_terminal_is_made_narrower():
    rows = [{"Model": "resnext29", "Saved for backward, MiB": saved, "Data": "digits"} for saved in ("66.4", "133")]
    table = tables.markdown(rows)
    assert terminal.aligned(table, width=42).splitlines()[0] == "Model      Saved for backward, MiB  Data"
    assert terminal.aligned(table, width=41).splitlines() == [
        "           Saved for", "           backward,", "Model            MiB  Data", "---------  ---------  ------",
        "resnext29       66.4  digits", "resnext29        133  digits",
    ]  # fmt: skip
    assert terminal.aligned(table, width=20).splitlines() == [
        "Model: resnext29", "Data: digits",
        "Saved for", "backward,", "      MiB", "---------", "     66.4", "      133",
    ]  # fmt: skip
    alike = tables.markdown([rows[0], rows[0]])  # Which nothing tells apart: no column is left out.
    assert terminal.aligned(alike, width=20).count("digits") == 2


def test_every_argument_that_tells_runs_apart_has_a_column():
    rows = read_table(overview.every_run([make_run(lr=0.01), make_run(lr=0.1), make_run(lr=0.1, seed=1)]))
    assert [(row["lr"], row["n"]) for row in rows] == [("0.01", "1"), ("0.1", "2")]
    assert "| lr |" not in overview.every_run([make_run(), make_run(num_worker=1)])


def test_rows_without_a_baseline_say_why():
    runs = [make_run(), make_run(experiment="resnext_checkpoint", policy="chain")]
    alone = make_run(experiment="resnext_checkpoint", policy="chain", batch_size=512)
    note = "No × at batch size 512: no run of resnext.py has otherwise equal settings."
    assert note in tables.render(CHECKPOINTING, [*runs, alone])
    assert "No ×" not in tables.render(CHECKPOINTING, runs)
    alone = [make_run(num_worker=0), make_run(num_worker=1)]
    assert "No ×: no run of resnext.py with 2 workers" in tables.render(DATA_LOADER, alone)


def test_two_sides_of_one_name_are_told_by_their_folders(tmp_path):
    sides = [[SimpleNamespace(name="run", path=tmp_path / folder / "run.json")] for folder in ("a", "b")]
    assert compare.names(sides) == ["A: a/run, n = 1", "B: b/run, n = 1"]


def test_an_interval_of_too_few_runs_is_not_told():
    assert interval_text(2.05, 0.00001, 297174.9) == "2.05 (too few runs)"
    assert interval_text(2.05, 1.0, 4.0) == "2.05 (1.00 to 4.00)"
