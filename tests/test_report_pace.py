"""Time to accuracy, and whose times stand for those of long runs."""

from run_records import make_run, read_table

from reporting import accuracy, headline, sentences


def timed(run, *points):
    for epoch, (seconds, acc) in zip(run.epochs, points, strict=True):
        epoch |= {"elapsed_seconds": seconds, "test_acc": acc}
    return run


def test_time_to_accuracy():
    base = [
        timed(make_run(seed=0), (10, 50), (20, 80), (30, 70)),
        timed(make_run(seed=1), (12, 50), (24, 60), (36, 75)),
    ]
    fast = [timed(make_run(experiment="resnext_fast", seed=seed), (2, 60), (4, 74), (6, 80)) for seed in (0, 1)]
    slow = [timed(make_run(num_worker=0, seed=0), (9, 50), (19, 60), (29, 74.9))]
    rows = {row["Set-up"]: row for row in read_table(accuracy.render(base + fast + slow))}
    # All of the baseline reach 75 %: after 20 and 36 s, of which 6 s are 0.30 and 0.17: 0.22 in the geometric mean.
    assert rows["original (baseline)"]["Seconds"].startswith("28.0")
    assert rows["everything on"]["Reached by"] == "2 of 2"
    assert rows["everything on"]["Time, × (95 % interval)"].startswith("0.22 (")
    assert rows["loading: 0 workers"]["Reached by"] == "0 of 1"
    assert rows["loading: 0 workers"]["Seconds"] == "–"
    assert "To 75.0 %" in accuracy.render(base + fast)
    wide = timed(make_run(experiment="resnext_fast", model="resnext29_2x8d"), (9, 70), (19, 75), (29, 81.2))
    toy = timed(make_run(experiment="resnext_fast", dataset="digits"), (9, 70), (19, 75), (29, 99))
    assert "0.22 (" in sentences.bullets(base + fast, [])
    assert "attain; one run of resnext29_2x8d attained 81.2 % in 3 epochs" in sentences.bullets(
        [*base, *fast, wide, toy], []
    )
    del fast[0].epochs[1]["elapsed_seconds"]
    assert accuracy.races(base + fast)[0].baseline.seconds_to(75) == [20, 36]
    assert fast[0].accuracy_by_seconds() == []


def test_of_a_way_that_not_every_run_of_reached_the_target_no_mean_is_told():
    """That of the others would flatter it."""
    runs = [timed(make_run(seed=seed), (10, 50), (20, 80), (30, 75)) for seed in (0, 1)]
    fast = {"experiment": "resnext_fast", "lr": 0.1}
    runs += [timed(make_run(seed=seed, **fast), (2, 60), (4, 79), (6, best)) for seed, best in enumerate((82, 79))]
    row = next(row for row in read_table(accuracy.render(runs)) if row["Set-up"] == "everything on")
    assert row["Reached by"] == "1 of 2"
    assert (row["Epochs"], row["Seconds"], row["Time, × (95 % interval)"]) == ("–", "–", "–")
    (race,) = accuracy.races(runs)
    assert accuracy.ratio_of(race, "everything on") is None


def paced(seconds, *accuracies, start=4.0, **arguments):
    """A Record of an epoch for each of `accuracies`, each of so many seconds, after `start` seconds."""
    run = make_run(num_epoch=len(accuracies), **arguments)
    run.record["start_up_seconds"] = start
    run.record["epochs"] = [
        dict(run.epochs[0], epoch=number, test_acc=acc, elapsed_seconds=start + number * seconds)
        for number, acc in enumerate(accuracies, 1)
    ]
    for epoch in run.epochs:
        epoch["timing"] = epoch["timing"] | {"seconds": seconds}
    return run


def test_long_runs_are_timed_by_short_ones_that_were_run_in_turn():
    long, short = [], []
    fast = {"experiment": "resnext_fast", "lr": 0.1}
    for seed, slow_hour in enumerate((1, 5, 1)):
        long += [paced(100 * slow_hour, 50, 60, 70, seed=seed), paced(90, 60, 75, 80, seed=seed, **fast)]
        short += [paced(100, 50, seed=seed), paced(20 + seed, 55, seed=seed, **fast)]
    (row,) = read_table(headline.render(long + short))
    assert row["Time, ×"] == "0.21 (0.19 to 0.24)"
    assert row["n"] == "3"
    assert "last epoch" in row["Change in result"]
    assert "(times: shorter, interleaved runs)" in headline.render(long + short)
    rows = {row["Set-up"]: row for row in read_table(accuracy.render(long + short))}
    assert rows["original (baseline)"]["Epochs"] == "3.0"
    assert rows["original (baseline)"]["Seconds"] == "304"
    assert rows["everything on"]["Seconds"].startswith("46.0")  # Start-up once, and two epochs.
    # Of two rounds for three seeds, and for another machine or batch size, nothing is taken.
    assert "shorter" not in headline.render(long + short[:4])
    for run in short:
        run.machine["hardware"] = "another"
    assert "shorter" not in headline.render(long + short)
    # Nor where the short runs of the baseline are missing.
    for run in short:
        run.machine["hardware"] = long[0].machine["hardware"]
    assert "shorter" not in headline.render(long + short[1::2] + [paced(30, 50, num_worker=0)])
    # An arm that was not run in short, or with another batch size, says how many epochs it takes, and not how many
    # seconds.
    more = [paced(80, 60, 70, 72, half_precision="bfloat16", precision="bf16")]
    block = {"experiment": "resnext_checkpoint", "policy": "block"}
    more += [paced(90, 60, 70, 72, batch_size=512, **block), paced(10, 60, **block)]
    rows = {row["Set-up"]: row for row in read_table(accuracy.render(long + short + more))}
    for name in ("half precision (bf16)", "recomputing: block, batch 512"):
        assert (rows[name]["Epochs"], rows[name]["Seconds"]) == ("2.0", "–")


def test_runs_are_called_interleaved_only_if_their_dates_overlap():
    fast = {"experiment": "resnext_fast", "lr": 0.1}
    long = [paced(100, 50, 60, 70, seed=seed, **more) for seed in (0, 1) for more in ({}, fast)]
    for hours, words in (
        ((("00", "02"), ("01", "03")), "shorter, interleaved runs"),
        ((("00", "01"), ("02", "03")), "shorter runs, hours apart from those of the baseline"),
        ((("02", "03"), ("00", "01")), "shorter runs, hours apart from those of the baseline"),
        (((None, "03"), ("00", "01")), "shorter runs"),
    ):
        short = [paced(100, 50, seed=seed, **more) for more in ({}, fast) for seed in (0, 1)]
        for run, hour in zip(short, (*hours[0], *hours[1]), strict=True):
            run.machine["date"] = hour and f"2026-01-01T{hour}:00:00Z"
        assert f"(times: {words})" in headline.render(long + short)


def test_runs_of_other_settings_and_long_ones_time_no_others():
    def pair(number, **more):
        fast = paced(20, *[55] * number, experiment="resnext_fast", lr=0.1, **more)
        return [paced(100, *[50] * number, **more), fast]

    long = pair(4)
    assert "shorter" in headline.render(long + pair(2))
    assert "shorter" not in headline.render(long + pair(3))  # These show a result of their own.
    assert "shorter" not in headline.render(long + pair(2, model="resnext29_2x64d"))
    # Two epochs, as a scorer is trained for, are timed by one, and one by no other.
    assert "shorter" in headline.render(pair(2) + pair(1))
    assert "shorter" not in headline.render(pair(1))
