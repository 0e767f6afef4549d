"""How long each way to train takes to reach a test accuracy, in wall-clock time: loading, training, evaluation and
saving, at the pace given by reporting/pace.py."""

import dataclasses

from reporting import pace
from reporting.comparison import Sample, quantity, ratio_with_interval
from reporting.studies import TOGETHER
from reporting.tables import caption, groups, markdown


@dataclasses.dataclass(frozen=True)
class Way:
    """A Row of TOGETHER with the curves of its runs: for each, [(seconds since its start, test accuracy in percent),
    ...], one point per epoch; [] if the seconds are not known."""

    row: object
    curves: list

    def best(self):
        """The best test accuracy of each run."""
        return [max(run.curve("test_acc")) for run in self.row.runs]

    def epochs_to(self, goal):
        """For each run, the epoch in which it first had this test accuracy in percent; None if it never had."""
        return [
            next((epoch["epoch"] for epoch in run.epochs if epoch["test_acc"] >= goal), None) for run in self.row.runs
        ]

    def seconds_to(self, goal):
        """For each run, the seconds from its start until it had this test accuracy; None if not known."""
        return [next((seconds for seconds, reached in curve if reached >= goal), None) for curve in self.curves]

    def sample(self, values):
        """The Sample of `values`, one per run; None if any is unknown: the mean of the runs that got there would
        flatter a way in which others did not."""
        seeds = [run.arguments.get("seed") for run in self.row.runs]
        return None if None in values else Sample.of(values, seeds)


@dataclasses.dataclass(frozen=True)
class Race:
    """The Ways of one Group of TOGETHER. baseline: one of them, or None. target: the test accuracy, in percent, that
    every run of the baseline reaches at some time, which is the lowest of their best; None without a baseline."""

    group: object
    ways: list
    baseline: Way | None

    @property
    def target(self):
        return min(self.baseline.best()) if self.baseline else None


def races(runs):
    """The Races of those `runs` that record when each epoch's test accuracy was known, without races of short runs."""
    found = groups(TOGETHER, [run for run in runs if run.accuracy_by_seconds()])
    return [_race(group, found) for group in found if pace.epochs(group) >= pace.FEW_EPOCHS]


def _race(group, found):
    ways = [Way(*each) for each in zip(group.rows, pace.accuracy_by_seconds(group, found), strict=True)]
    base = group.baseline(group.rows[0])
    return Race(group, ways, next((way for way in ways if way.row is base), None))


def render(runs, with_cpu_times=True):
    """Markdown: a table for each group of ResNeXt runs that can be compared; "" if there is none."""
    parts, found = [], races(runs)
    for race in found:
        goal = race.target
        if goal is None:
            continue
        with_times = with_cpu_times or not race.baseline.row.runs[0].on_cpu
        rows = [_cells(way, race, goal, with_times) for way in race.ways]
        line = f"To {goal:.1f} % test accuracy, which every run of the baseline reaches:"
        parts.append("\n\n".join([caption(race.group, [each.group for each in found]), line, markdown(rows)]))
    return "\n\n".join(parts)


def _cells(way, race, goal, with_times):
    epochs, seconds = way.epochs_to(goal), way.seconds_to(goal)
    base, everywhere = race.baseline.sample(race.baseline.seconds_to(goal)), way.sample(seconds)
    is_base = way is race.baseline
    return {
        "Set-up": f"{way.row.arm.label} (baseline)" if is_base else way.row.arm.label,
        "n": str(len(epochs)),
        "Reached by": f"{sum(each is not None for each in epochs)} of {len(epochs)}",
        "Epochs": quantity(way.sample(epochs), places=1),
        "Seconds": quantity(everywhere) if with_times else None,
        "Time, × (95 % interval)": "1.00" if is_base else ratio_with_interval(everywhere, base),
        "Best test accuracy, %": quantity(Sample.of(way.best()), places=1),
    }


def ratio_of(race, label):
    """ "0.08 (0.06 to 0.10)": the time to the target of the arm `label`, over the baseline's; None without both, or if
    a run never got there."""
    way = next((way for way in race.ways if way.row.arm.label == label), None)
    if race.target is None or way is None:
        return None
    base, new = (each.sample(each.seconds_to(race.target)) for each in (race.baseline, way))
    return ratio_with_interval(new, base)
