"""The phase table of Nsight Systems traces: a real one, made-up ones with GPU work, and a live one where nsys is."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from harness.endings import UserError
from harness.epoch_times import WARMUP_STEPS
from reporting.nsys import read_trace
from reporting.records import Record, combine

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).with_name("fixtures")
PROCESS, MAIN, AUTOGRAD = 77, 77 << 24 | 77, 77 << 24 | 78
MS = 1_000_000


def assert_agree(trace, record, figures=("median", "p95", "total")):
    """Host times within 5 %, or 5 microseconds a step, which is what pushing and popping a range takes."""
    assert set(trace["phases"]) == set(record["phases"]) >= {"forward", "backward", "step"}
    assert (trace["steps"], trace["warmup_steps"]) == (record["steps"], record["warmup_steps"])
    for name, phase in record["phases"].items():
        found = trace["phases"][name]
        assert found["count"] == phase["count"]
        for key in figures:
            slack = 5e-3 * (record["steps"] if key == "total" else 1)
            assert found["host_ms"][key] == pytest.approx(phase["host_ms"][key], rel=0.05, abs=slack), (name, key)


@pytest.fixture
def real_trace(tmp_path):
    path = tmp_path / "trace.sqlite"
    with sqlite3.connect(path) as database:
        database.executescript((FIXTURES / "nsys_2022.sql").read_text())
    return path


def test_a_real_trace_agrees_with_the_runs_own_record(real_trace):
    record = FIXTURES / "nsys_2022.record.json"
    ((_, timings),) = read_trace(real_trace).items()
    assert [timing["steps"] for timing in timings] == [12, 8]
    for timing, epoch in zip(timings, json.loads(record.read_text())["epochs"], strict=True):
        assert_agree(timing, epoch["timing"])
        assert timing["seconds"] == pytest.approx(epoch["timing"]["seconds"], rel=0.05)
    assert_agree(combine(timings), Record(record, json.loads(record.read_text())).timing())


def test_the_command_prints_the_table(real_trace, run_script):
    output = run_script("report.py", "--nsys", real_trace).stdout
    assert "20 steps" in output
    assert "| Phase | Count | Host median, ms |" in output
    assert "Device" not in output
    assert sum(line.startswith("| backward | 15 |") for line in output.splitlines()) == 1


def make_trace(path, steps, ranges_as_text=False):
    """A trace with GPU work, and ranges that are no phases. In each step of 100 ms forward launches three overlapping
    kernels from the main thread, and backward a kernel and a copy from autograd's; the GPU does them later, after the
    ranges have closed."""
    database = sqlite3.connect(path)
    database.executescript("""
        CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, globalTid INT, textId INT,
                                  domainId INT);
        CREATE TABLE StringIds (id INT, value TEXT);
        CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, globalTid INT, correlationId INT);
        CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, correlationId INT, globalPid INT);
        CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INT, end INT, correlationId INT, globalPid INT);
    """)
    names, calls = {}, []

    def push_pop(name, start, end, domain=0):
        number = names.setdefault(name, len(names))
        words = (name, None) if ranges_as_text else (None, number)
        row = (start * MS, end * MS, 59, words[0], MAIN, words[1], domain)
        database.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def launch(kind, called, thread, start, end):
        calls.append(None)
        call = (called * MS, called * MS + 1000, thread, len(calls))
        work = (start * MS, end * MS, len(calls), PROCESS << 24)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)", call)
        database.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_{kind} VALUES (?, ?, ?, ?)", work)

    push_pop("training resnext", 0, 100 * steps + 20)
    push_pop("epoch 1", 10, 100 * steps + 10)
    for step in range(steps):
        at = 10 + 100 * step
        push_pop(f"epoch 1 - step {step + 1}", at, at + 90)
        push_pop("forward", at + 10, at + 30)
        push_pop("aten::conv2d", at + 12, at + 14)  # Not a phase: it lies in one.
        push_pop("Holding GIL", at + 20, at + 95, domain=3)  # Of a domain of its own, so that it may overlap any.
        push_pop(f"aten::add, seq = {step}, op_id = {7 * step}, sizes = [[], []]", at + 32, at + 33)
        push_pop("backward", at + 40, at + 80)
        launch("KERNEL", at + 15, MAIN, at + 50, at + 57)
        launch("KERNEL", at + 16, MAIN, at + 51, at + 52)
        launch("KERNEL", at + 17, MAIN, at + 55, at + 60)
        launch("KERNEL", at + 45, AUTOGRAD, at + 60, at + 90)
        launch("MEMCPY", at + 79, AUTOGRAD, at + 91, at + 93)
        launch("KERNEL", at + 85, MAIN, at + 93, at + 94)  # In no phase.
    # Another process's launch of the same number is not ours.
    database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, 1)", (25 * MS, 26 * MS, 5 << 24 | 5))
    database.executemany("INSERT INTO StringIds VALUES (?, ?)", [(number, name) for name, number in names.items()])
    database.commit()
    database.close()


@pytest.mark.parametrize("ranges_as_text", [False, True])
def test_gpu_time_goes_to_the_range_that_launched_the_work(tmp_path, ranges_as_text):
    make_trace(tmp_path / "trace.sqlite", WARMUP_STEPS + 3, ranges_as_text)
    (timing,) = read_trace(tmp_path / "trace.sqlite")[PROCESS]
    phases = timing["phases"]
    assert set(phases) == {"forward", "aten::add", "backward", "step"}
    assert phases["aten::add"]["count"] == 3  # One row, whatever an annotation adds to the name.
    assert phases["forward"]["count"] == 3
    assert phases["forward"]["host_ms"]["median"] == pytest.approx(20)
    assert phases["forward"]["device_ms"]["median"] == pytest.approx(10)  # 50 to 60: what overlaps counts once.
    assert phases["backward"]["device_ms"]["median"] == pytest.approx(32)
    assert phases["step"]["device_ms"]["median"] == pytest.approx(43)
    assert phases["backward"]["share"] == pytest.approx(0.32)
    assert timing["unphased_seconds"] == pytest.approx(timing["seconds"] * (1 - 0.32 - 0.10))


@pytest.mark.parametrize("row", ["'x', 1, 9, 'forward'", "NULL, 1, 9, 'forward'", "1, NULL, 9, 'forward'",
                                 "1, 9, 1, 'forward'", "1, 'a', 9, 'forward'", "1, 1, 9, x'00ff'",
                                 "1, 1.5, 9, 'forward'"])  # fmt: skip
def test_a_row_that_is_no_range_is_passed_over_and_told(tmp_path, row, capsys):
    make_trace(tmp_path / "trace.sqlite", 6)
    expected = read_trace(tmp_path / "trace.sqlite")
    assert capsys.readouterr().err == ""
    with sqlite3.connect(tmp_path / "trace.sqlite") as database:
        database.execute(f"INSERT INTO NVTX_EVENTS (globalTid, start, end, text, eventType) VALUES ({row}, 59)")
    assert read_trace(tmp_path / "trace.sqlite") == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert "ranges left out, as they have not ended" in line
    assert line.endswith(": 1")


LOOP = [("epoch 1", 0, 300)] + [
    (name, 100 * step + start, 100 * step + end)
    for step in range(3)
    for name, start, end in ((f"epoch 1 - step {step + 1}", 0, 100), ("forward", 0, 60), ("backward", 60, 90))
]


def trace_of(ranges, path):
    """A trace of ranges (name, start, end) in milliseconds; an end of None is of one that has not ended."""
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, globalTid INT)")
        rows = [(start * MS, end and end * MS, 59, name, MAIN) for name, start, end in ranges]
        database.executemany("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?)", rows)
    return path


@pytest.mark.parametrize(
    ("ranges", "line"),
    [
        (LOOP + [("other - step 1", 10, 20)], "the step 'other - step 1' is nested in 'epoch 1 - step 1'"),
        (LOOP + LOOP, "the step 'epoch 1 - step 1' is nested in 'epoch 1"),
        (LOOP[:-2] + [("validation", 200, 300), ("other - step 1", 210, 220)], "'other - step 1' is nested in"),
        (LOOP + [("epoch 1 - step 4", 299, 310)], "'epoch 1 - step 3' and 'epoch 1 - step 4' overlap"),
        (LOOP + [("loss", 50, 70)], "'loss' overlap, which push/pop ranges of one thread cannot"),
        (LOOP + [("logging", 95, 105)], "overlap, which push/pop"),
    ],
)
def test_ranges_whose_shares_would_be_impossible_are_refused(ranges, line, tmp_path):
    ranges = [(name, start, 400 if name == "epoch 1" else end) for name, start, end in ranges]
    with pytest.raises(UserError, match=line) as error:
        read_trace(trace_of(ranges, tmp_path / "trace.sqlite"))
    assert "trace.sqlite" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_phase_that_takes_no_time_lies_beside_the_one_that_it_touches(tmp_path):
    for at in (60, 90):
        ranges = LOOP + [("zero grad", at + 100 * step, at + 100 * step) for step in range(3)]
        (timing,) = read_trace(trace_of(ranges, tmp_path / "trace.sqlite"))[PROCESS]
        assert set(timing["phases"]) == {"forward", "backward", "zero grad", "step"}
        assert timing["phases"]["zero grad"]["host_ms"]["total"] == 0
        assert timing["phases"]["backward"]["host_ms"]["total"] == 90


def test_what_lies_beside_the_steps_of_an_epoch_that_has_not_ended_is_told(tmp_path, capsys):
    ended = [("epoch 0", -100, -10), ("epoch 0 - step 1", -90, -80), ("validation", -50, -20)]
    ranges = [*ended, ("epoch 1", 0, None), *LOOP[1:], ("validation", 300, 350)]
    first, second = read_trace(trace_of(ranges, tmp_path / "trace.sqlite"))[PROCESS]
    assert ("validation" in first["phases"], "validation" in second["phases"]) == (True, False)
    told = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == ["1", "1"]
    assert "ranges left out, as they lie beside 3 steps in no epoch that has ended" in told[1]


def test_work_of_several_phases_at_once_is_told(tmp_path, capsys):
    make_trace(tmp_path / "trace.sqlite", 6)
    assert read_trace(tmp_path / "trace.sqlite")
    assert capsys.readouterr().err == ""
    with sqlite3.connect(tmp_path / "trace.sqlite") as database:
        database.execute("UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = 0, end = 600000000")
    assert read_trace(tmp_path / "trace.sqlite")
    assert "the GPU worked for several phases at once" in capsys.readouterr().err


def test_of_two_threads_with_steps_the_one_with_more_is_told(tmp_path, capsys):
    make_trace(tmp_path / "trace.sqlite", 6)
    expected = read_trace(tmp_path / "trace.sqlite")
    with sqlite3.connect(tmp_path / "trace.sqlite") as database:
        for thread in (MAIN - 1, MAIN + 5):
            row = f"1, 9, 59, 'other - step 1', {thread}"
            database.execute(f"INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid) VALUES ({row})")
        # And work without an end, as of a program that was killed.
        database.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({600 * MS}, NULL, 2, {PROCESS << 24})")
    assert read_trace(tmp_path / "trace.sqlite") == expected
    assert capsys.readouterr().err.count("process 77 has steps in several threads") == 2


def test_a_pipe_is_no_trace(tmp_path):
    os.mkfifo(tmp_path / "pipe.sqlite")
    with pytest.raises(UserError, match="pipe.sqlite is not a file"):
        read_trace(tmp_path / "pipe.sqlite")


def test_the_table_of_a_gpu_trace_has_device_times(tmp_path, run_script):
    make_trace(tmp_path / "trace.sqlite", WARMUP_STEPS + 3)
    output = run_script("report.py", "--nsys", tmp_path / "trace.sqlite").stdout
    assert "| backward | 3 | 40.00 | 40.00 | 0.3200 | 32.00 | 32.00 | 0.2560 | 32.0 |" in output


def test_no_trace_of_ours_is_one_line(tmp_path, run_script):
    files = {name: tmp_path / name for name in ("text", "cut", "empty", "other", "no_steps")}
    files["text"].write_text("no database")
    files["cut"].write_bytes(b"SQLite format 3\0" + bytes(range(200)))
    files["empty"].write_bytes(b"")
    for name, statement in {
        "other": "CREATE TABLE some (thing INT)",
        "no_steps": "CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, globalTid INT)",
    }.items():
        with sqlite3.connect(files[name]) as database:
            database.execute(statement)
    for path in [*files.values(), tmp_path / "absent", tmp_path]:
        with pytest.raises(UserError, match=path.name) as error:
            read_trace(path)
        assert "\n" not in str(error.value)
    result = run_script("report.py", "--nsys", files["other"], code=2)
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_profile_without_nsys_says_how_to_get_it_and_traces_by_torch(tmp_path):
    (tmp_path / "script.py").write_text("import sys; print(sys.argv[1:])")
    command = [shutil.which("bash"), str(ROOT / "reporting" / "profile.sh"), "trace", "script.py", "--lr", "1"]
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))  # A PATH without nsys.
    environment = {"PATH": str(tmp_path), "PYTHON": sys.executable, "STEPS": "12"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "developer.nvidia.com" in result.stderr
    assert result.stdout.strip() == "['--lr', '1', '--trace', 'trace.json.gz', '--max_steps', '12']"


@pytest.fixture
def fake_nsys(tmp_path):
    """fake_nsys(lines of shell): profile.sh with an nsys that writes a report, and runs these lines for an export."""

    def run(export):
        (tmp_path / "bin").mkdir()
        nsys = tmp_path / "bin" / "nsys"
        profile = f'echo a report >"{tmp_path}/trace.nsys-rep"'
        nsys.write_text(f'#!/bin/sh\ncase "$1" in\nprofile) {profile} ;;\nexport) {export} ;;\nesac\n')
        nsys.chmod(0o755)
        command = ["bash", str(ROOT / "reporting" / "profile.sh"), str(tmp_path / "trace"), "script.py"]
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    return run


@pytest.mark.parametrize(
    ("export", "reason"),
    [
        ("echo Processing; echo 'Failed: the report is corrupt' >&2; echo; exit 1", "Failed: the report is corrupt"),
        ("exit 3", "no reason given"),
    ],
)
def test_an_export_that_fails_is_one_line_with_its_reason(fake_nsys, tmp_path, export, reason):
    result = fake_nsys(export)
    assert result.returncode == 2
    assert result.stderr == f"profile.sh: nsys export of {tmp_path}/trace.nsys-rep failed: {reason}\n"
    assert result.stdout == ""


def test_what_nsys_exports_is_printed(fake_nsys, real_trace, tmp_path):
    exported = real_trace.rename(tmp_path / "exported.sqlite")
    result = fake_nsys(f'echo Processing; cp "{exported}" "{tmp_path}/trace.sqlite"')
    assert result.returncode == 0, result.stderr
    assert "20 steps" in result.stdout
    assert "Processing" not in result.stdout


@pytest.mark.skipif(shutil.which("nsys") is None, reason="Nsight Systems is not installed")
def test_a_live_trace_agrees_with_the_runs_own_record(tmp_path, pictures):
    command = [
        "bash",
        str(ROOT / "reporting" / "profile.sh"),
        str(tmp_path / "trace"),
        str(ROOT / "resnext/resnext.py"),
    ]
    options = ["--dataset", "folder", "--data_dir", str(pictures), "--model", "resnext29_1x4d", "--num_worker", "0"]
    options += ["--batch_size", "4", "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHON": sys.executable, "STEPS": "45"}
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "| backward | 40 |" in result.stdout
    (record,) = tmp_path.glob("*.json")
    ((_, timings),) = read_trace(tmp_path / "trace.sqlite").items()
    # The medians alone: single steps differ by what happens between a range and the clock beside it.
    assert_agree(combine(timings), Record(record, json.loads(record.read_text())).timing(), figures=("median",))


def test_memory_that_is_set_graphs_and_imported_ranges_count(tmp_path):
    make_trace(tmp_path / "trace.sqlite", WARMUP_STEPS + 3)
    with sqlite3.connect(tmp_path / "trace.sqlite") as database:
        database.execute("UPDATE NVTX_EVENTS SET eventType = 70")
        for number, kind in enumerate(("MEMSET", "GRAPH_TRACE")):
            table = f"CUPTI_ACTIVITY_KIND_{kind}"
            database.execute(f"CREATE TABLE {table} AS SELECT * FROM CUPTI_ACTIVITY_KIND_MEMCPY WHERE 0")
            for step in range(WARMUP_STEPS + 3):
                called, start, key = 28 + 100 * step, 100 + 2 * number + 100 * step, 1000 + 2 * step + number
                call = (called * MS, called * MS + 1000, MAIN, key)
                database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?)", call)
                work = (start * MS, (start + 1) * MS, key, PROCESS << 24)
                database.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", work)
    (timing,) = read_trace(tmp_path / "trace.sqlite")[PROCESS]
    assert timing["phases"]["forward"]["device_ms"]["median"] == pytest.approx(10 + 1 + 1)
