"""Two processes, started as torchrun starts them, compute what one does. (Of ResNeXt: test_resnext_scripts.py.)"""

import json
import signal
import socket
from pathlib import Path

import bad_inputs
import launch
import pytest
import tiny_inputs
import torch

from harness import job
from harness.endings import UserError
from scorer.significance import ALONE

SCORER_CHECK = """
import sys
sys.path[:0] = sys.argv[1:3]
import torch, torch.distributed as dist
from data_utils import LengthBatches, load_samples
from harness import distributed
from model import load_scorer, ranking_loss

def gradients(scorer, samples, world, rank, size):
    "The gradients of each update of an epoch of 43 samples: of 8, and in the last batch of 3."
    batches = LengthBatches(samples.document_lengths[:43], 8, 2, 0, rank, size)
    parallel, found = world.wrap(scorer) if size > 1 else scorer, []
    for number, part in enumerate(batches.batches()):
        if batches.starts_update(number):
            scorer.zero_grad()
        batch = samples.batch(part)
        parallel.require_backward_grad_sync = batches.ends_update(number)
        scores, gold = parallel(batch)
        (ranking_loss(scores, gold, batch.rouge, batch.present) * batches.weight(number)).backward()
        if batches.ends_update(number):
            found.append(torch.cat([weight.grad.flatten() for weight in scorer.parameters()]))
    return torch.stack(found)

with distributed.world(torch.device("cpu")) as world:
    assert world.size == 2
    scorer, encoding, _ = load_scorer(sys.argv[3], total_len=60, max_len=20)
    with world.first_on_machine():
        samples = load_samples(sys.argv[4] + "/train", encoding, 16, None, "cpu", say=world.say)
    alone = gradients(scorer, samples, world, 0, 1)
    shared = gradients(scorer, samples, world, world.rank, world.size)
    assert alone.abs().max() > 1e-3
    assert (alone - shared).abs().max() < 1e-6, (alone - shared).abs().max()
"""
KEEP_EVERY_RANK = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/SimCLS"]
import torch
from scorer import scorer_run
add = scorer_run.ScorerRun.add_validation
def spy(self, update, result, scorer):
    torch.save(scorer.state_dict(), "rank" + os.environ["RANK"] + ".pt")
    return add(self, update, result, scorer)
scorer_run.ScorerRun.add_validation = spy
"""


def test_scorer_gradients_of_two_processes_are_those_of_one(encoders, sample_folder, tmp_path):
    (tmp_path / "check.py").write_text(SCORER_CHECK)
    launch.run_two(
        tmp_path / "check.py", launch.ROOT, launch.ROOT / "SimCLS", encoders["t5"], sample_folder, cwd=tmp_path
    )


LONG_WORK_ALONE = """
import datetime, os, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from harness import distributed, endings

distributed.TRAINING_TIMEOUT = datetime.timedelta(seconds=3)

def main():
    with distributed.world(torch.device("cpu")) as world:
        with world.first_on_machine():
            if world.is_main:
                time.sleep(6)
        if world.is_main:
            time.sleep(4)
        world.barrier()
        assert world.sum(torch.ones(1)) == 2
        if "fail" in sys.argv:
            if world.is_main:
                raise endings.UserError("the disk is full")
            world.barrier()

endings.run(main)
"""


def test_the_others_wait_for_a_process_that_works_alone_longer_than_for_one_that_hangs(tmp_path):
    (tmp_path / "check.py").write_text(LONG_WORK_ALONE)
    launch.run_two(tmp_path / "check.py", launch.ROOT, cwd=tmp_path)


DISAGREE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from harness import distributed, endings

def main():
    with distributed.world(torch.device("cpu")) as world:
        world.check_equal(True, "what is the same")
        world.check_equal(world.rank == 0, "whether this is the first")

endings.run(main)
"""


def test_processes_that_disagree_end_each_in_one_line(tmp_path):
    (tmp_path / "check.py").write_text(DISAGREE)
    for process in launch.run_two(tmp_path / "check.py", launch.ROOT, cwd=tmp_path, code=2):
        assert process.err == "check.py: the processes of this job do not agree on whether this is the first\n"


def test_where_the_main_process_fails_alone_the_others_end_in_one_line(tmp_path):
    (tmp_path / "check.py").write_text(LONG_WORK_ALONE)
    main, other = launch.run_two(tmp_path / "check.py", launch.ROOT, "fail", cwd=tmp_path, code=2)
    assert main.err == "check.py: the disk is full\n"
    assert other.err == "check.py: another process of this job has ended; its own message says why\n"


def test_scorers_of_two_processes_are_equal_and_validate_each_sample_once(encoders, sample_folder, tmp_path):
    for split, count in (("train", 44), ("val", 11), ("test", 11)):  # The same 11 samples, to validate and to test.
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            source = sample_folder / ("train" if split == "train" else "val") / f"{number}.json"
            (tmp_path / "data" / split / f"{number}.json").symlink_to(source)
    arguments = ["--dataset", "data", "--model_type", encoders["t5"], "--num_workers", 0, "--num_epoch", 1,
                 "--batch_size", 6, "--lr", 0.002, "--run_name", "two"]  # fmt: skip
    before = KEEP_EVERY_RANK.format(root=str(launch.ROOT))
    _, other = launch.run_two("SimCLS/main.py", *arguments, cwd=tmp_path, before=before)
    assert other.out == ""
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (epoch,) = json.loads((tmp_path / "cache/two/two.json").read_text())["epochs"]
    alone = launch.run("SimCLS/main.py", "-e", "--dataset", "data", "--model_pt", "two/model.bin", cwd=tmp_path)
    assert "11 documents" in alone.out, alone.err
    systems = json.loads((tmp_path / "cache/two/evaluation.json").read_text())["systems"]
    assert systems[ALONE]["rouge1"]["mean"] == pytest.approx(epoch["val_rouge1"], abs=1e-6)


def test_fine_tuning_of_two_processes_leaves_one_set_of_files(encoders, tmp_path):
    table = tiny_inputs.make_table(tmp_path / "papers.csv")
    command = ["--pt_model", encoders["t5"], "--data_file", table, "--save_dir", "tuned", "--num_epoch", 1,
               "--max_source_length", 24, "--max_target_length", 8]  # fmt: skip
    _, other = launch.run_two("SimCLS/finetune_model.py", *command, "--batch_size", 8, cwd=tmp_path)
    assert other.out == ""
    record = json.loads((tmp_path / "tuned/finetune.json").read_text())
    assert record["history"][-1]["step"] == 6  # 48 documents.
    assert not (tmp_path / "tuned/checkpoints").exists()
    refused = launch.run("SimCLS/finetune_model.py", *command, "--batch_size", 9, cwd=tmp_path, **launch.JOB,
                         RANK="0", LOCAL_RANK="0")  # fmt: skip
    assert refused.code == 2
    assert "cannot be split equally over 2 processes" in refused.err


@pytest.mark.parametrize(
    "left_over",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"RANK": "zero", "LOCAL_RANK": "0", **launch.JOB},
        {"RANK": "2", "LOCAL_RANK": "0", **launch.JOB},
        {"RANK": "1", "LOCAL_RANK": "-1", **launch.JOB},
        {"RANK": "0", "LOCAL_RANK": "0", **launch.JOB, "MASTER_ADDR": ""},
        {"RANK": "0", "LOCAL_RANK": "0", **launch.JOB, "MASTER_PORT": "auto"},
    ],
)
def test_what_is_left_over_of_another_job_is_one_line(left_over, monkeypatch):
    for name in (*job.JOB_VARIABLES, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert job.read_job() == (False, 0, 0, 1, 1)
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    name = next(iter(left_over))
    with pytest.raises(
        UserError, match=f"{name}={left_over[name]}.*, which torchrun never sets like this; unset .*{name}"
    ):
        job.read_job()


def test_the_variables_of_torchrun_make_a_job(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", **launch.JOB, "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert job.read_job() == (True, 3, 1, 4, 2)


@pytest.mark.parametrize("script", ["resnext/resnext.py", "SimCLS/main.py", "SimCLS/finetune_model.py"])
def test_every_script_refuses_what_is_left_over_of_another_job(script, tmp_path):
    good = {"good": tmp_path, "bad": tmp_path}
    ended = launch.run(script, *bad_inputs.GOOD[script].format(**good).split(), cwd=tmp_path, WORLD_SIZE="")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "the environment has WORLD_SIZE=, which torchrun never sets like this" in ended.err


MEETS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from harness import distributed, endings

distributed.TRIES_FOR_ADDRESS = 2

def main():
    print("waits", flush=True)
    with distributed.world(torch.device("cpu")):
        print("met")

endings.run(main)
"""
ALONE_IN_JOB = launch.JOB | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def one_line_of_meeting(tmp_path, **job):
    (tmp_path / "check.py").write_text(MEETS)
    ended = launch.run(tmp_path / "check.py", launch.ROOT, cwd=tmp_path, **ALONE_IN_JOB | job)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "waits\n", 1), ended.err
    return ended.err


def test_processes_that_cannot_meet_are_told_in_one_line(encoders, tmp_path):
    for port in ("70000", "65536", "-1", "0"):
        line = one_line_of_meeting(tmp_path, MASTER_PORT=port)
        assert f"MASTER_PORT={port}, which torchrun never sets like this; unset RANK" in line
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} (the port is already in use); set MASTER_PORT" in one_line_of_meeting(
            tmp_path, MASTER_PORT=port
        )
        started = ["--pt_model", encoders["t5"], "--data_file", tiny_inputs.make_table(tmp_path / "papers.csv")]
        ended = launch.run("SimCLS/finetune_model.py", *started, "--save_dir", "tuned", cwd=tmp_path,
                           **ALONE_IN_JOB | {"MASTER_PORT": port})  # fmt: skip
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
        assert f"port {port} (the port is already in use)" in ended.err
    for address in ("no-such-host.invalid", "a" * 70, "a..b"):
        line = one_line_of_meeting(tmp_path, MASTER_ADDR=address)
        assert f"cannot meet at {address}, port 1 (there is no such address: " in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("of_the_library", [False, True])
def test_a_process_that_waits_for_another_heeds_a_signal(of_the_library, number, encoders, tmp_path):
    """Whether it is the harness that waits, or the library's Trainer."""
    (tmp_path / "check.py").write_text(MEETS)
    command = [tmp_path / "check.py", launch.ROOT]
    if of_the_library:
        papers = tiny_inputs.make_table(tmp_path / "papers.csv")
        command = ["SimCLS/finetune_model.py", "--pt_model", encoders["t5"], "--data_file", papers]
        command += ["--save_dir", "tuned"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    job = ALONE_IN_JOB | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    process = launch.Script(*command, cwd=tmp_path, before=HEED_SIGNALS, **job)
    assert launch.wait_until(lambda: listens(port) or not process.running(), launch.PATIENCE), process.err
    process.kill(number)
    assert process.wait(60) in (-number, 128 + number)  # Torch's own patience is ten minutes.
    assert process.err == ""


# The tests themselves may have been started by nohup, and what is ignored stays so.
HEED_SIGNALS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""


def listens(port):
    """Whether a process of this machine listens on a port, as Linux tells without connecting to it."""
    rows = [line.split() for path in ("tcp", "tcp6") for line in Path("/proc/net", path).read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
