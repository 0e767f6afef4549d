"""PhaseTimer's arithmetic on a clock that the test moves."""

import argparse
import contextlib
from types import SimpleNamespace

import pytest
import torch

from harness import runs, timing
from harness.distributed import World
from harness.epoch_times import WARMUP_STEPS, summarise, training_seconds
from harness.loading import EpochBatches
from harness.timing import PhaseTimer

CPU = torch.device("cpu")


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.ns = 0

    def perf_counter_ns(self):
        return self.ns

    def perf_counter(self):
        return self.ns / 1e9

    def pass_ms(self, milliseconds):
        self.ns += round(milliseconds * 1e6)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


class Batches:
    """`count` batches, each of which takes `milliseconds` to come."""

    def __init__(self, clock, count, milliseconds):
        self.clock, self.count, self.milliseconds = clock, count, milliseconds

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            self.clock.pass_ms(self.milliseconds)
            yield number


def run_epoch(timer, clock, forward_ms, load_ms=2, optimizer_every=1, between_ms=1):
    timer.start_epoch()
    for number, _ in timer.steps(Batches(clock, len(forward_ms), load_ms), "epoch 1"):
        with timer("forward"):
            clock.pass_ms(forward_ms[number])
        if number % optimizer_every == 0:
            with timer("optimizer"):
                clock.pass_ms(10 + number)
        clock.pass_ms(between_ms)
    return timer.end_epoch()


def test_summary_by_hand(clock):
    forward_ms = [1000] * WARMUP_STEPS + [10, 20, 30, 40]
    timing = run_epoch(PhaseTimer(CPU), clock, forward_ms)
    forward = timing["phases"]["forward"]
    assert forward["count"] == 4
    assert forward["host_ms"]["median"] == pytest.approx(25)
    assert forward["host_ms"]["p95"] == pytest.approx(38.5)  # 30 + 0.85 * 10, between the 3rd and the 4th.
    assert forward["host_ms"]["total"] == pytest.approx(5100)  # Warm-up counts in totals.
    assert forward["device_ms"] is None
    assert timing["phases"]["data load"]["host_ms"]["median"] == pytest.approx(2)
    optimizer_ms = sum(10 + number for number in range(9))
    seconds = (5100 + optimizer_ms + 9 * 2 + 9 * 1) / 1e3
    assert timing["seconds"] == pytest.approx(seconds)
    assert (timing["steps"], timing["warmup_steps"]) == (9, WARMUP_STEPS)
    assert forward["share"] == pytest.approx(5.1 / seconds)
    assert timing["unphased_seconds"] == pytest.approx(9e-3)  # "step" holds the others, and is not one of them.
    assert timing["phases"]["step"]["host_ms"]["total"] == pytest.approx(1e3 * seconds)


def test_warm_up_is_by_steps_not_by_samples(clock):
    """A phase of every second step has lost three samples to a warm-up of five steps, not five."""
    timing = run_epoch(PhaseTimer(CPU), clock, [1] * 10, optimizer_every=2)
    optimizer = timing["phases"]["optimizer"]
    assert optimizer["count"] == 2
    assert optimizer["host_ms"]["median"] == pytest.approx((10 + 6 + 10 + 8) / 2)


def test_warm_up_is_of_the_process_not_of_the_epoch(clock):
    timer = PhaseTimer(CPU)
    first = run_epoch(timer, clock, [5] * (WARMUP_STEPS + 1))
    second = run_epoch(timer, clock, [7] * 3)
    assert first["phases"]["forward"]["count"] == 1
    assert (second["warmup_steps"], second["phases"]["forward"]["count"]) == (0, 3)
    assert second["phases"]["forward"]["host_ms"]["total"] == pytest.approx(21)  # Nothing of the first epoch.


def test_an_epoch_within_warm_up_has_no_median(clock):
    forward = run_epoch(PhaseTimer(CPU), clock, [5] * WARMUP_STEPS)["phases"]["forward"]
    assert forward["count"] == 0
    assert forward["host_ms"] == {"median": None, "p95": None, "total": pytest.approx(5.0 * WARMUP_STEPS)}


@pytest.fixture
def slow_device(clock, monkeypatch):
    """A PhaseTimer with events of a device that takes three times as long as its host."""

    class Event:
        def record(self):
            self.ms = clock.ns / 1e6

        def elapsed_time(self, end):
            return 3 * (end.ms - self.ms)

    timer = PhaseTimer(CPU)
    monkeypatch.setattr(timer, "_on_cuda", True)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    return timer


def test_device_times_of_events(clock, slow_device):
    """Shares are those of the device."""
    forward = run_epoch(slow_device, clock, [10] * 8)["phases"]["forward"]
    assert forward["host_ms"]["median"] == pytest.approx(10)
    assert forward["device_ms"]["median"] == pytest.approx(30)
    assert forward["share"] == pytest.approx(3 * 8 * 10 / (8 * (2 + 10 + 13.5 + 1)))


def test_validations_within_an_epoch_are_no_training(clock, slow_device, tmp_path):
    """By the device's time, where there is one: the host's begins while the device is still at the steps before it."""

    def epoch_of(timer):
        timer.start_epoch()
        for _ in timer.steps(Batches(clock, 2, 5), "epoch 1"):
            with timer("forward"):
                clock.pass_ms(45)
            with timer("validation"):
                clock.pass_ms(10)
        return timer.end_epoch()

    on_host, on_device = epoch_of(PhaseTimer(CPU)), epoch_of(slow_device)
    assert training_seconds(on_host) == pytest.approx(0.12 - 2 * 0.01)
    assert training_seconds(on_device) == pytest.approx(0.12 - 2 * 0.03)
    run = runs.Run("x", tmp_path, "x", argparse.Namespace(num_epoch=1), World(0, 1, CPU))
    run.record_epoch(SimpleNamespace(number=0, samples=30, timing=on_device), 0.0)
    assert run.history[0]["samples_per_second"] == pytest.approx(30 / 0.06)


@pytest.mark.parametrize(("every", "steps"), [(0, [1, 2, 3, 4, 5, 6, 7, 8]), (0.04 / 60, [4, 8]), (0.09 / 60, [])])
def test_saving_is_every_so_many_minutes_and_not_timed_as_training(
    clock, slow_device, monkeypatch, tmp_path, every, steps
):
    """Neither in a step of the host or the device, nor in the time of the epoch."""

    class SavingRun(runs.Run):
        saves_within_epochs = True

        def save(self, epoch, step, **state):
            saved.append(step)
            clock.pass_ms(1000)
            self._saved_at = clock.perf_counter()

        def progress_bar(self, epoch):
            return contextlib.nullcontext(SimpleNamespace(update=lambda samples: None, disable=True))

    monkeypatch.setattr(runs, "time", clock)
    args = argparse.Namespace(num_epoch=1, save_every=every, resume=False, max_steps=None, trace=None)
    run, batches, saved = SavingRun("x", tmp_path, "x", args, World(0, 1, CPU)), EpochBatches(8, 1, 0), []
    for epoch in run.epochs(slow_device, batches):
        for _ in epoch.steps(batches):
            with slow_device("forward"):
                clock.pass_ms(10)
    assert saved == steps
    assert epoch.timing["seconds"] == pytest.approx(0.08)
    assert epoch.timing["phases"]["step"]["host_ms"]["total"] == pytest.approx(80)
    assert epoch.timing["phases"]["step"]["device_ms"]["total"] == pytest.approx(3 * 80)


def test_a_pause_within_a_step_is_in_no_phase_and_not_in_the_next_step(clock):
    timer = PhaseTimer(CPU)
    timer.start_epoch()
    for number, _ in timer.steps(Batches(clock, 2, 1), "epoch 1"):
        if number == 0:
            with timer.paused():
                clock.pass_ms(500)
        with timer("forward"):
            clock.pass_ms(10)
    timing = timer.end_epoch()
    assert timing["seconds"] == pytest.approx(0.022)
    assert timing["phases"]["step"]["host_ms"]["total"] == pytest.approx(22)
    assert timing["phases"]["forward"]["host_ms"]["total"] == pytest.approx(20)


def test_all_pauses_of_a_step_are_left_out(clock):
    """A step may be followed by a validation and a save."""
    timer = PhaseTimer(CPU)
    timer.start_epoch()
    for _ in timer.steps(Batches(clock, 1, 1), "epoch 1"):
        for milliseconds in (500, 300):
            with timer.paused():
                clock.pass_ms(milliseconds)
            clock.pass_ms(10)
    timing = timer.end_epoch()
    assert timing["seconds"] == pytest.approx(0.021)
    assert timing["phases"]["step"]["host_ms"]["total"] == pytest.approx(21)


def test_what_a_watcher_does_as_a_range_begins_is_no_training(clock, monkeypatch):
    """As of a tracer, which writes its file there."""

    def write(name):
        clock.pass_ms(500 if name.endswith("step 2") else 0)
        return contextlib.nullcontext()

    monkeypatch.setattr(timing, "watchers", [write])
    found = run_epoch(PhaseTimer(CPU), clock, [10, 20], optimizer_every=9)
    assert found["seconds"] == pytest.approx(0.046)  # Loading 2 and 2, 30, the optimizer 10, and 1 and 1 in no phase.
    assert found["unphased_seconds"] == pytest.approx(0.002)
    assert found["phases"]["step"]["host_ms"]["total"] == pytest.approx(46)


def test_steps_stop_at_the_limit(clock):
    timer = PhaseTimer(CPU)
    timer.start_epoch()
    numbers = [number for number, _ in timer.steps(Batches(clock, 9, 1), "epoch 1", first=2, limit=3)]
    assert numbers == [2, 3, 4]
    assert timer.end_epoch()["steps"] == 3


def test_a_step_after_which_the_loop_is_left_counts(clock):
    timer = PhaseTimer(CPU)
    timer.start_epoch()
    for _ in timer.steps(Batches(clock, 9, 1), "epoch 1"):
        timer.end_step()
        break
    timing = timer.end_epoch()
    assert (timer.steps_done, timing["warmup_steps"]) == (1, 1)
    assert timing["phases"]["step"]["host_ms"]["median"] is None  # All of it was warm-up.


def test_a_disabled_timer_takes_nothing(clock):
    timer = PhaseTimer(CPU, enabled=False)
    timing = run_epoch(timer, clock, [5] * 8)
    assert timing["phases"] == {}
    assert timer.steps_done == 8


def test_summarise_without_samples():
    assert summarise([], 0) == {"median": None, "p95": None, "total": 0.0}
