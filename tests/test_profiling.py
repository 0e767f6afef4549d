"""PhaseTimer's arithmetic on a clock that the test moves, and SavedBytes against a hand count and torch.profiler."""

import pytest
import torch
from torch import nn

from harness import profiling
from harness.profiling import WARMUP_STEPS, PhaseTimer, SavedBytes, count_saved, peak_memory, summarise

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
    monkeypatch.setattr(profiling, "time", clock)
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


def test_device_times_of_events(clock, monkeypatch):
    """With events of a device that takes three times as long as its host, shares are those of the device."""

    class Event:
        def record(self):
            self.ms = clock.ns / 1e6

        def elapsed_time(self, end):
            return 3 * (end.ms - self.ms)

    timer = PhaseTimer(CPU)
    monkeypatch.setattr(timer, "_on_cuda", True)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.pass_ms(0))
    forward = run_epoch(timer, clock, [10] * 8)["phases"]["forward"]
    assert forward["host_ms"]["median"] == pytest.approx(10)
    assert forward["device_ms"]["median"] == pytest.approx(30)
    assert forward["share"] == pytest.approx(3 * 8 * 10 / (8 * (2 + 10 + 13.5 + 1)))


def test_steps_stop_at_the_limit(clock):
    timer = PhaseTimer(CPU)
    timer.start_epoch()
    numbers = [number for number, _ in timer.steps(Batches(clock, 9, 1), "epoch 1", first=2, limit=3)]
    assert numbers == [2, 3, 4]
    assert timer.end_epoch()["steps"] == 3


def test_a_disabled_timer_takes_nothing(clock):
    timer = PhaseTimer(CPU, enabled=False)
    timing = run_epoch(timer, clock, [5] * 8)
    assert timing["phases"] == {}
    assert timer.steps_done == 8


def test_summarise_without_samples():
    assert summarise([], 0) == {"median": None, "p95": None, "total": 0.0}


def test_no_peak_memory_on_a_cpu():
    assert peak_memory(CPU) is None


def test_saved_bytes_by_hand():
    """Linear saves its input (its weight is the model's); ReLU its output, which the next Linear saves too: once."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    with SavedBytes(model) as saved:
        model(torch.randn(16, 32))
    assert saved.bytes == 4 * (16 * 32 + 16 * 64)


def test_saved_bytes_count_a_view_as_its_storage_once():
    x = torch.randn(10, 10, requires_grad=True)
    with SavedBytes(nn.Identity()) as saved:
        y = x * 1.0
        y[:, :2].exp().sum() + y[:, 2:].pow(2).sum()
    # exp saves its result [10, 2]; pow a view of y, whose storage is whole.
    assert saved.bytes == 4 * (10 * 2 + 10 * 10)


@pytest.mark.parametrize("dims", [2, 3])
def test_saved_bytes_leave_out_autocasts_copies_of_weights(dims):
    """Saved are the cast input and the hidden layer, in half precision; the casts of the weights are no activations."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    images = torch.randn(16, 32) if dims == 2 else torch.randn(4, 4, 32)
    with SavedBytes(model) as saved, torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert saved.bytes == 2 * (16 * 32 + 16 * 64)
    convolution = nn.Conv2d(3, 8, 3, bias=False)
    with SavedBytes(convolution) as saved, torch.autocast("cpu", torch.bfloat16):
        convolution(torch.randn(2, 3, 16, 16))
    assert saved.bytes == 2 * (2 * 3 * 16 * 16)


def test_saved_bytes_count_what_is_made_of_a_weight_and_is_no_copy():
    model = nn.Linear(8, 8)
    with SavedBytes(model) as saved:
        model.weight.exp().sum()
    assert saved.bytes == 4 * 8 * 8


def test_saved_bytes_can_count_again():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
    saved, counts = SavedBytes(model), []
    for _ in range(3):
        with saved:
            model(torch.randn(16, 32))
        counts.append(saved.bytes)
    assert counts == [4 * (16 * 32 + 16 * 64)] * 3
    assert saved.first_time() is not saved


def test_saved_bytes_take_what_code_with_hooks_of_its_own_tells():
    model, hidden = nn.Linear(2, 2), torch.randn(100)
    with SavedBytes(model) as saved:
        count_saved(hidden)
        count_saved(hidden[:10])
        count_saved(model.weight)
    assert saved.bytes == 400


def test_saved_bytes_agree_with_the_allocator():
    """torch.profiler sees how much is allocated and not freed in forward: what is saved, and the output."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Tanh()
    )
    images = torch.randn(8, 3, 32, 32)
    with SavedBytes(model) as saved:
        output = model(images)
    del output
    with torch.profiler.profile(profile_memory=True) as profile:
        output = model(images)
    kept = sum(event.self_device_memory_usage + event.self_cpu_memory_usage for event in profile.key_averages())
    assert output.requires_grad  # It was alive when the profiler stopped; Tanh saves it. The images were there before.
    assert saved.bytes == pytest.approx(kept + images.nbytes, rel=0.01)
