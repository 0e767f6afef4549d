"""-l: log.txt and TensorBoard events, of which a resumed run keeps what its state knows of."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.epoch_times import summarise
from harness.run_log import RunLog, timing_figures


def scalars(folder, name="loss"):
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def log_epochs(log, epochs, value):
    for epoch in epochs:
        log.line(f"epoch {epoch}: {value}")
        log.plot({"loss": value}, epoch)


def test_what_was_logged_after_the_state_is_purged(tmp_path):
    first = RunLog(tmp_path / "run")
    log_epochs(first, (1, 2), 0.5)
    state = first.state_dict()
    log_epochs(first, (3, 4), 0.25)
    first.close()
    first.line("ended")  # What follows the epochs opens it again.
    first.close()
    for value in (0.125, 0.75):  # Killed twice after the same state.
        resumed = RunLog(tmp_path / "run")
        resumed.resume(state, 2)
        log_epochs(resumed, (3,), value)
        resumed.close()
    assert (tmp_path / "run/log.txt").read_text().splitlines() == ["epoch 1: 0.5", "epoch 2: 0.5", "epoch 3: 0.75"]
    assert scalars(tmp_path / "run") == [(1, 0.5), (2, 0.5), (3, 0.75)]


def test_a_run_that_begins_anew_replaces_the_log_and_one_without_a_log_writes_nothing(tmp_path):
    for value in (0.5, 0.25):
        log = RunLog(tmp_path / "run")
        log_epochs(log, (1,), value)
        log.close()
    assert (tmp_path / "run/log.txt").read_text() == "epoch 1: 0.25\n"
    assert scalars(tmp_path / "run") == [(1, 0.25)]
    silent = RunLog(None)
    silent.resume({"bytes": 7}, 1)
    log_epochs(silent, (1,), 0.5)
    silent.close()
    assert silent.state_dict() == {"bytes": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_figures_are_the_medians_by_phase_and_the_peak():
    device, host, warm = summarise([1, 2, 9]), summarise([5, 6, 7]), summarise([1], warmup=1)
    phases = {"forward": {"device_ms": device, "host_ms": host}, "backward": {"device_ms": None, "host_ms": host}}
    phases["step"] = {"device_ms": None, "host_ms": warm}
    figures = timing_figures({"phases": phases, "peak_memory": {"allocated_bytes": 3 * 2**20}})
    assert figures == pytest.approx({"milliseconds/forward": 2, "milliseconds/backward": 6, "memory/peak_MiB": 3})


def test_what_a_state_knows_of_is_in_the_files(tmp_path):
    """A run that is killed right after its state was saved closes nothing."""
    log = RunLog(tmp_path / "run")
    log_epochs(log, (1, 2), 0.5)
    assert log.state_dict() == {"bytes": len("epoch 1: 0.5\n") * 2}
    assert scalars(tmp_path / "run") == [(1, 0.5), (2, 0.5)]
    assert (tmp_path / "run/log.txt").stat().st_size == log.state_dict()["bytes"]
    log.close()
