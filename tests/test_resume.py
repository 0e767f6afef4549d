"""Going on with a ResNeXt run: where it was interrupted, or ended, or elsewhere; and what no run replaces unasked."""

import json

import launch
import numpy as np
import pytest
import torch

from harness.files import output_lock
from harness.resume import changes

SCRIPT = "resnext/resnext.py"
NAME = "resnext_0_worker_8_resnext29_1x4d_folder"
# SIGTERM during a step of this process; `kill` is how often a batch's weight has been asked for.
STOP_IN_STEP = f"""
import os, signal, sys
sys.path.insert(0, {str(launch.ROOT)!r})
from harness import loading
weight, seen = loading.EpochBatches.weight, []
def spy(self, number):
    seen.append(number)
    if len(seen) == {{}}: os.kill(os.getpid(), signal.SIGTERM)
    return weight(self, number)
loading.EpochBatches.weight = spy
"""


@pytest.fixture(scope="module")
def tiny(pictures):
    """The arguments of runs of 6 steps an epoch."""
    return ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 8,
            "--num_worker", 0, "--lr", 0.002]  # fmt: skip


@pytest.fixture
def run(tiny, tmp_path):
    """run("--num_epoch", 2, code=0, before="") -> the ended Script, in a folder of the test's own."""

    def run(*more, code=0, before="", script=SCRIPT):
        ended = launch.run(script, *tiny, "--output_dir", ".", *more, cwd=tmp_path, before=before)
        assert ended.code == code, ended.err
        assert ended.err.count("\n") == (code != 0)
        return ended

    return run


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The folder of a run of 3 epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    ended = launch.run(SCRIPT, *tiny, "--output_dir", ".", "--num_epoch", 3, cwd=folder)
    assert ended.code == 0, ended.err
    return folder


def assert_same_results(one, other, name=NAME):
    weights, others = (torch.load(path) for path in (one / f"{NAME}.pt", other / f"{name}.pt"))
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    curves, other_curves = (np.load(path) for path in (one / f"{NAME}.npz", other / f"{name}.npz"))
    for key in ("loss", "acc", "test_acc"):
        assert np.array_equal(curves[key], other_curves[key]), key


def position(folder, name=NAME):
    parts = torch.load(folder / f"{name}.state", weights_only=True)["parts"]
    return parts["epoch"], parts["step"]


def test_stopped_twice_in_one_epoch_and_at_its_very_end(run, whole, tmp_path):
    for steps, where in ((2, (0, 2)), (1, (0, 3)), (3, (0, 6)), (8, (2, 2))):
        go_on = ["--resume"] if where != (0, 2) else []
        stopped = run("--num_epoch", 3, *go_on, code=143, before=STOP_IN_STEP.format(steps))
        assert "run the same command with --resume to continue" in stopped.err
        assert position(tmp_path) == where
    run("--num_epoch", 3, "--resume")
    assert_same_results(whole, tmp_path)
    epochs = json.loads((tmp_path / f"{NAME}.json").read_text())["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    # Of each epoch its longest part, since no part has seen the first one whole.
    assert [epoch["timing"]["steps"] for epoch in epochs] == [3, 6, 4]
    assert all(epoch["samples_per_second"] > 0 for epoch in epochs)


# In a step, as above, but standard output has no reader any more, or its disk is full.
LOSE_OUTPUT = {
    "gone": "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)",
    "full": 'os.dup2(os.open("/dev/full", os.O_WRONLY), 1)',
}


@pytest.mark.parametrize(("kind", "reason"), [("gone", "Broken pipe"), ("full", "No space left on device")])
def test_a_run_whose_output_cannot_be_written_stops_and_goes_on(run, whole, tmp_path, kind, reason):
    lose = STOP_IN_STEP.format(8).replace("os.kill(os.getpid(), signal.SIGTERM)", LOSE_OUTPUT[kind])
    stopped = run("--num_epoch", 3, code=2, before=lose)
    (line,) = stopped.err.splitlines()
    assert f"cannot write to the standard output ({reason}); run the same command with --resume" in line
    assert "resuming from" in run("--num_epoch", 3, "--resume").out
    assert_same_results(whole, tmp_path)


def test_an_interrupted_run_is_not_begun_anew_unasked(run, tmp_path):
    run("--num_epoch", 2, code=143, before=STOP_IN_STEP.format(8))
    state = (tmp_path / f"{NAME}.state").read_bytes()
    line = run("--num_epoch", 2, code=2).err
    assert f"{NAME}.state holds an interrupted run (1 of 2 epochs done)" in line
    assert "--resume continues it, --restart starts over" in line
    assert "--lr 0.002 (now 0.1)" in run("--num_epoch", 2, "--lr", 0.1, code=2).err
    assert (tmp_path / f"{NAME}.state").read_bytes() == state
    assert "epoch 1/2" in run("--num_epoch", 2, "--restart").out


def test_a_finished_run_is_not_replaced_unasked(run, pictures, tmp_path):
    run("--num_epoch", 1, "--max_steps", 2)
    (tmp_path / f"{NAME}_2_steps.json").rename(tmp_path / f"{NAME}.json")
    run("--num_epoch", 1, "--lr", 0.003)  # A record of a profiled run is neither finished nor worth keeping.
    finished = (tmp_path / f"{NAME}.pt").read_bytes()
    again = ["--num_epoch", 1, "--lr", 0.003]
    assert f"{NAME}.json is a finished run; --restart runs it again" in run(*again, code=2).err
    (tmp_path / "moved").symlink_to(pictures)
    moved = ["--data_dir", tmp_path / "moved"]
    for more, change in ((["--lr", 0.001], "--lr 0.003 (now 0.001)"), (moved, f"--data_dir {pictures.name} (")):
        line = run(*again, *more, code=2).err
        assert f"is from a run with {change}" in line
        assert "choose another --output_dir, or --restart to replace it" in line
    assert "nothing to resume" in run(*again, *moved, "--resume").out
    assert (tmp_path / f"{NAME}.pt").read_bytes() == finished
    run("--num_epoch", 1, "--lr", 0.001, "--restart")
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["arguments"]["lr"] == 0.001


def test_what_nothing_tells_the_run_of_is_not_replaced_unasked(run, tmp_path):
    run("--num_epoch", 1)
    weights, record, state = (tmp_path / f"{NAME}{suffix}" for suffix in (".pt", ".json", ".state"))
    before, text = weights.read_bytes(), record.read_bytes()
    kept = state.rename(tmp_path / "kept")
    for torn, named in ((b"{", record), (None, weights)):
        record.unlink()
        if torn:
            record.write_bytes(torn)
        for more in ([], ["--resume"]):
            line = run("--num_epoch", 1, "--lr", 0.003, *more, code=2).err
            assert f"{named.name} already exists, and no record says which run it is from; move it away" in line
    kept.rename(state)
    run("--num_epoch", 1, "--resume")  # As a run that was killed before it had a record.
    assert weights.read_bytes() == before
    assert json.loads(record.read_bytes())["epochs"][0]["loss"] == json.loads(text)["epochs"][0]["loss"]


def test_timings_of_a_few_steps_give_way_to_the_same_again_alone_and_of_all_steps_to_none(run, tmp_path):
    few = ["--num_epoch", 1, "--max_steps", 2]
    run(*few)
    run(*few)
    before = (tmp_path / f"{NAME}_2_steps.json").read_bytes()
    assert "_2_steps.json is from a run with --lr 0.002 (now 0.003); choose" in run(*few, "--lr", 0.003, code=2).err
    assert (tmp_path / f"{NAME}_2_steps.json").read_bytes() == before
    whole = ["--num_epoch", 1, "--max_steps", 2000]  # There are 6.
    run(*whole)
    assert "_2000_steps.json is a finished run; --restart runs it again" in run(*whole, code=2).err
    assert "nothing to resume" in run(*whole, "--resume").out


def test_what_is_no_state_is_not_replaced_unasked(run, tmp_path):
    (tmp_path / f"{NAME}.state").write_text("no state")
    assert "not a complete training state" in run("--num_epoch", 1, code=2).err
    run("--num_epoch", 1, "--restart")


def test_a_finished_run_is_made_longer(run, whole, tmp_path):
    run("--num_epoch", 1)
    assert "is a finished run; --restart runs it again, --resume with a larger" in run("--num_epoch", 3, code=2).err
    run("--num_epoch", 3, "--resume", code=143, before=STOP_IN_STEP.format(8))
    assert position(tmp_path) == (2, 2)
    assert len(json.loads((tmp_path / f"{NAME}.json").read_text())["epochs"]) == 1  # Still that of the shorter run.
    run("--num_epoch", 3, "--resume")
    assert_same_results(whole, tmp_path)
    assert "nothing to resume" in run("--num_epoch", 3, "--resume").out
    assert "is after 3 epochs, more than --num_epoch 2; choose" in run("--num_epoch", 2, "--resume", code=2).err
    (tmp_path / f"{NAME}.state").unlink()
    assert "is gone; --restart starts over" in run("--num_epoch", 4, "--resume", code=2).err


def test_a_run_that_began_with_restart_and_was_stopped_goes_on(run, tmp_path):
    """The record there is still that of the run before it."""
    run("--num_epoch", 1)
    begun = ["--num_epoch", 1, "--lr", 0.003]
    line = run(*begun, "--restart", code=143, before=STOP_IN_STEP.format(3)).err
    assert "run the same command with --resume instead of --restart to continue" in line
    line = run(*begun, code=2).err
    assert "holds an interrupted run (0 of 1 epochs done); --resume continues it, --restart starts over" in line
    assert "resuming from" in run(*begun, "--resume").out
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["arguments"]["lr"] == 0.003


def test_the_state_of_the_run_before_is_not_taken_for_ones_own(run):
    small = ["--num_epoch", 1, "--save_every", 60]
    run(*small)
    line = run(*small, "--lr", 1e30, "--restart", code=2).err
    assert "in epoch 1. Use a smaller" in line


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_results_that_are_gone_are_written_again_or_told(run, tmp_path, suffix):
    run("--num_epoch", 1)
    path = tmp_path / f"{NAME}{suffix}"
    before = path.read_bytes()
    path.unlink()
    assert f"{path.name} is gone; writing it again" in run("--num_epoch", 1, "--resume").out
    assert path.read_bytes() == before
    path.unlink()
    (tmp_path / f"{NAME}.state").unlink()
    line = run("--num_epoch", 1, "--resume", code=2).err
    assert f"{path.name} is gone, and no {NAME}.state is there to write it again from; put it back, or --rest" in line


def test_a_run_that_was_stopped_within_an_epoch_does_not_end_before_it(run, tmp_path):
    run("--num_epoch", 3, code=143, before=STOP_IN_STEP.format(9))
    state = (tmp_path / f"{NAME}.state").read_bytes()
    line = run("--num_epoch", 1, "--resume", code=2).err
    assert f"{NAME}.state is after 1 epoch and 3 steps, more than --num_epoch 1; choose a larger one" in line
    assert (tmp_path / f"{NAME}.state").read_bytes() == state
    assert not list(tmp_path.glob("*.pt"))


def test_a_run_whose_rate_depends_on_its_length_is_not_made_longer(run, tmp_path):
    fast = {"script": "resnext/resnext_fast.py"}
    run("--num_epoch", 1, **fast)
    assert not list(tmp_path.glob("*.state"))
    line = run("--num_epoch", 2, "--resume", code=2, **fast).err
    assert "--num_epoch 1 (now 2); the learning rate follows one cycle over all epochs, so it cannot be" in line


def test_a_run_goes_on_with_other_workers(run, whole, tmp_path):
    other = NAME.replace("0_worker", "2_worker")
    run("--num_epoch", 3, "--num_worker", 2, code=143, before=STOP_IN_STEP.format(8))
    assert position(tmp_path, other) == (1, 2)
    assert f"resuming from {other}.state" in run("--num_epoch", 3, "--resume").out
    assert_same_results(whole, tmp_path)
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert (record["continues"], record["epochs_elsewhere"], len(record["epochs"])) == (other, 1, 3)
    assert "earlier_commits" not in record
    # A finished run's state is no interrupted one: other arms of a study begin anew.
    (tmp_path / f"{other}.state").unlink()
    assert "starting from the beginning" in run("--num_epoch", 3, "--loader", "device", "--resume").out


def test_of_two_states_of_one_run_the_further_is_gone_on_from(run, tmp_path):
    """Of one that was stopped, went on with other workers, and was stopped again."""
    run("--num_epoch", 3, code=143, before=STOP_IN_STEP.format(3))
    run("--num_epoch", 3, "--num_worker", 1, "--resume", code=143, before=STOP_IN_STEP.format(4))
    further = NAME.replace("0_worker", "1_worker")
    assert position(tmp_path, NAME) < position(tmp_path, further)
    assert f"resuming from {further}.state" in run("--num_epoch", 3, "--resume").out


def test_the_state_of_a_run_that_still_trains_is_not_gone_on_from(run, tmp_path):
    run("--num_epoch", 3, "--num_worker", 2, code=143, before=STOP_IN_STEP.format(8))
    with output_lock(tmp_path / f"{NAME.replace('0_worker', '2_worker')}.lock"):
        assert "starting from the beginning" in run("--num_epoch", 1, "--resume").out


@pytest.mark.parametrize(("name", "value", "elsewhere", "commits"),
    [("commit", "0123456789ab-dirty", None, ["0123456789ab-dirty"]), ("commit", None, None, ["unknown"]),
     ("threads", 99, 1, None), ("hardware", "another", 1, None)])  # fmt: skip
def test_what_another_machine_or_other_code_trained_is_recorded(run, tmp_path, name, value, elsewhere, commits):
    run("--num_epoch", 1)
    path = tmp_path / f"{NAME}.state"
    state = torch.load(path, weights_only=True)
    state["parts"]["machine"][name] = value
    torch.save(state, path)
    run("--num_epoch", 2, "--resume")
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert record.get("epochs_elsewhere") == elsewhere
    assert record.get("earlier_commits") == commits


def test_an_argument_that_only_one_of_two_runs_has_is_a_change():
    assert changes({"a": 1}, {"a": 1, "lr": 0.1}) == "--lr None (now 0.1)"
    assert changes({"a": 1, "lr": 0.1}, {"a": 1}) == "--lr 0.1 (now None)"
    assert changes({"a": 1}, {"a": 1}) == ""


def test_a_flag_that_is_off_and_that_only_one_of_two_runs_knows_is_no_change():
    """A state saved before there was such a flag can be resumed."""
    older, newer = {"lr": 0.1, "old": False}, {"lr": 0.1, "new": False}
    assert changes(older, newer) == ""
    assert changes(older, newer | {"new": True}) == "--new None (now True)"
    assert changes({"auto": None}, {"auto": False}) == "--auto None (now False)"
