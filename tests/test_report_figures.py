"""The arithmetic of the report: the figures of one run, samples, noise, and how numbers are written."""

from pathlib import Path

import numpy as np
import pytest
from run_records import make_record, make_run, make_timing

from reporting import comparison, records
from reporting.comparison import Sample, number, quantity
from reporting.records import Record, combine


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


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 0], [5, 2, 4], [1, 4, 4]])
def test_a_median_over_epochs_counts_each_as_often_as_it_has_samples(counts):
    values = [3.0, 1.0, 2.0]
    expected = np.median(np.repeat(values, counts))
    assert records._weighted_median(list(zip(values, counts, strict=True))) == expected
    assert records._weighted_median([(value, 10**12 * count) for value, count in zip(values, counts, strict=True)]) == (
        np.median(np.repeat(values, np.array(counts) * 2))
    )
    assert records._weighted_median([]) is None


def test_validations_between_a_scorers_steps_are_no_training():
    plain, validated = make_run(), make_run()
    for epoch in validated.epochs:
        timing = epoch["timing"]
        times, host = {"median": 5e3, "p95": 5e3, "total": 1e4}, {"median": 6e3, "p95": 6e3, "total": 1.2e4}
        timing["seconds"] += 10
        timing["phases"]["step"]["device_ms"]["total"] += 1e4
        timing["phases"]["validation"] = {"count": 2, "share": 0.2, "host_ms": host, "device_ms": times}
    for figure in (Record.epoch_seconds, Record.overall_seconds, Record.load_percent, Record.step_ms):
        assert figure(validated) == pytest.approx(figure(plain))


def test_the_peak_leaves_out_epochs_in_which_algorithms_are_tried():
    record = make_record()
    for epoch, (warmup, peak) in zip(record["epochs"], ((5, 9e9), (0, 6e9), (0, 7e9)), strict=True):
        memory = {"allocated_bytes": int(peak), "reserved_bytes": int(peak)}
        epoch["timing"] |= {"warmup_steps": warmup, "peak_memory": memory}
    assert Record(Path("record.json"), record).allocated_gb() == 7
    for epoch in record["epochs"]:
        epoch["timing"]["warmup_steps"] = 5
    assert Record(Path("record.json"), record).allocated_gb() == 9


def test_an_epoch_that_was_cut_short_is_no_epoch_time():
    record = make_record()
    record["epochs"][2]["timing"] |= {"steps": 10, "seconds": 1.0}  # Resumed in its middle.
    run = Record(Path("record.json"), record)
    assert run.epoch_seconds() == 40
    assert run.overall_seconds() is None
    record = make_record()
    for pictures, seconds in ((49_900, 50), (49_920, 50), (49_921, None)):  # 390 batches of at most 128, or 391.
        alone = record | {"data": {"train_pictures": pictures}, "epochs": record["epochs"][:1]}
        assert Record(Path("record.json"), alone).epoch_seconds() == seconds
    record = make_record(max_steps=100)
    record["epochs"] = [{"epoch": 1, "timing": make_timing()}]  # What --max_steps leaves.
    assert Record(Path("record.json"), record).epoch_seconds() is None
    assert Record(Path("record.json"), record).step_ms() == 100


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
    assert comparison.ratio_with_interval(Sample.of([2.0, 3.0, 4.0]), sample) == "1.50 (0.54 to 4.17)"
    assert comparison.ratio_with_interval(sample, sample) == "1.00"
    assert comparison.difference(Sample.of([1.0, 2.5]), sample) == "-0.2, within the noise"
    assert comparison.ratio_with_interval(sample, None) is None
    assert (comparison.signed(-0.04), comparison.signed(-0.06)) == ("+0.0", "-0.1")
    # The scatter of the three, a quarter squared, is the single one's too: a third together, for 2 degrees of freedom.
    factor = np.exp(4.303 * np.sqrt(1 / 3))
    assert comparison.ratio_interval(Sample.of([4.0]), sample) == pytest.approx((2, 2 / factor, 2 * factor), rel=1e-3)


def test_each_side_scatters_by_itself():
    """Two values far apart tell little, however close to each other many others are (Welch, and not Student)."""
    many, two = Sample.of([9.9, 10.1] * 5), Sample.of([10.5, 13.5])
    assert comparison.within_noise(two, many)
    assert comparison.within_noise(many, two)


def test_what_does_not_scatter_differs_or_is_the_same():
    one, other = Sample.of([5.0, 5.0]), Sample.of([5.1, 5.1, 5.1])
    assert comparison.within_noise(one, other) is False
    assert comparison.within_noise(one, Sample.of([5.0, 5.0, 5.0])) is True
    assert comparison.difference_interval(other, one) == pytest.approx((0.1, 0.1, 0.1))
    assert comparison.difference(other, one) == "+0.1"


def test_runs_are_compared_with_those_of_their_own_seed():
    """Where seeds differ by more than what is compared: the memory of a first step, or two slow hours."""
    base = Sample.of([10.0, 20.0, 40.0], seeds=[0, 1, 2])
    half = Sample.of([21.0, 5.0, 10.0], seeds=[2, 0, 1])  # 0.50, 0.50 and 0.525 of their own.
    found, low, high = comparison.ratio_interval(half, base)
    logs = np.log([0.5, 0.5, 0.525])
    factor = np.exp(4.303 * logs.std(ddof=1) / np.sqrt(3))
    middle = np.exp(logs.mean())
    assert (found, low, high) == pytest.approx((middle, middle / factor, middle * factor), rel=1e-3)
    # Their differences are 5, 10 and 19, with a deviation of 7.095: 4.303 x 7.095 / sqrt(3) is 17.62.
    assert comparison.difference_interval(half, base) == pytest.approx(
        (-34 / 3, -34 / 3 - 17.62, -34 / 3 + 17.62), abs=0.01
    )
    # So t is 2.77 where 4.30 is the limit. Of differences of 0.9, 1.0 and 1.1 it is 17.
    assert comparison.within_noise(half, base)
    assert comparison.difference(Sample.of([10.9, 21.0, 41.1], seeds=[0, 1, 2]), base) == "+1.0"
    # Of what one side alone has, nothing is said; a single pair has no noise.
    assert comparison.ratio_with_interval(Sample.of([19.0, 90.0], seeds=[1, 7]), base) == "0.95"
    assert comparison.within_noise(Sample.of([19.0], seeds=[1]), base) is None
    assert comparison.ratio_with_interval(Sample.of([5.0, 10.0], seeds=[0, 1]), base) == "0.50"
    assert comparison.ratio_with_interval(Sample.of([0.0, 1.0], seeds=[0, 1]), base) == "0.03"
    # Two equal differences may be chance; three are not.
    assert comparison.within_noise(Sample.of([10.5, 20.5], seeds=[0, 1]), base) is None
    assert comparison.within_noise(Sample.of([10.5, 20.5, 40.5], seeds=[0, 1, 2]), base) is False
    assert comparison.ratio_interval(Sample.of([1e150, 1e-150], seeds=[0, 1]), base)[2] > 1e300
    nothing = Sample.of([0.0, 0.0], seeds=[0, 1])
    assert comparison.ratio_with_interval(base, nothing) is None
    # Seeds that no side shares are independent.
    apart = Sample.of([5.0, 10.0, 20.0], seeds=[3, 4, 5]), Sample.of([10.0, 20.0, 40.0])
    assert comparison.ratio_interval(apart[0], base) == comparison.ratio_interval(*apart)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123456, "0.00123"),
        (1.6, "1.60"),
        (9.996, "10.0"),
        (104.2, "104"),
        (8934, "8934"),
        (1024.4, "1024"),
        (1143.96, "1144"),
        (99.96, "100"),
        (float("nan"), "nan"),
        (-2.5, "-2.50"),
    ],
)
def test_numbers_have_three_digits_and_all_before_the_point(value, text):
    assert number(value) == text


def test_quantities():
    assert quantity(Sample.of([104.0])) == "104"
    assert quantity(Sample.of([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert quantity(Sample.of([97.14, 97.36]), places=1) == "97.2 ± 0.2"
    assert quantity(None) is None
