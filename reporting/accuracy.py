"""How long each way to train took to reach a test accuracy, by the clock on the wall: everything counts."""

from reporting.comparison import Sample, quantity, ratio_with_interval
from reporting.studies import TOGETHER
from reporting.tables import caption, groups, markdown


def timed_groups(runs):
    """The Groups of TOGETHER whose runs say when they knew each epoch's test accuracy."""
    return groups(TOGETHER, [run for run in runs if run.accuracy_by_seconds()])


def target(group):
    """The test accuracy, in percent, that each run of the baseline reaches at some time: the lowest of their best."""
    base = group.baseline(group.rows[0])
    return min(max(accuracy for _, accuracy in run.accuracy_by_seconds()) for run in base.runs) if base else None


def seconds_to(run, accuracy):
    """Seconds until `run` had this test accuracy in percent, from its start; None if it never had."""
    return next((seconds for seconds, reached in run.accuracy_by_seconds() if reached >= accuracy), None)


def render(runs):
    """Markdown: a table for each group of ResNeXt runs that can be compared; "" when there is none."""
    parts, found = [], timed_groups(runs)
    for group in found:
        goal = target(group)
        if goal is None:
            continue
        base = group.baseline(group.rows[0])
        base_sample = Sample.of(seconds_to(run, goal) for run in base.runs)
        rows = []
        for row in group.rows:
            seconds = [seconds_to(run, goal) for run in row.runs]
            sample, reached = Sample.of(seconds), sum(each is not None for each in seconds)
            # The mean of those that got there would flatter an arm whose others did not.
            everywhere = sample if reached == len(row.runs) else None
            rows.append(
                {
                    "Way": f"{row.arm.label} (baseline)" if row is base else row.arm.label,
                    "n": str(len(row.runs)),
                    "Reached by": f"{reached} of {len(row.runs)}",
                    "Seconds": quantity(everywhere),
                    "Time, × (95 % interval)": "1.00" if row is base else ratio_with_interval(everywhere, base_sample),
                    "Best test accuracy, %": quantity(Sample.of(map(best, row.runs)), places=1),
                }
            )
        lines = [f"Until {goal:.1f} % of the test pictures are right, which every run of the baseline reaches:"]
        parts += ["\n\n".join([caption(group, found), *lines, markdown(rows)])]
    return "\n\n".join(parts)


def ratio_of(group, label):
    """ "0.08 (0.06 to 0.10)": the time to the target of the arm `label` over the baseline's; None without both, or
    where a run never got there."""
    goal = target(group)
    rows = [group.baseline(group.rows[0]), next((row for row in group.rows if row.arm.label == label), None)]
    if goal is None or None in rows:
        return None
    base, new = ([seconds_to(run, goal) for run in row.runs] for row in rows)
    return None if None in new else ratio_with_interval(Sample.of(new), Sample.of(base))


def best(run):
    return max(accuracy for _, accuracy in run.accuracy_by_seconds())
