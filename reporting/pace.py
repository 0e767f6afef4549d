"""Where the times of long runs come from: short runs of the same set-ups, if there are any.

Runs that show a result take hours, in which a shared machine varies in speed. So `bash run.sh cifar` and `simcls` also
run each set-up for one epoch, round by round, so that slow hours affect all of them alike.
"""

FEW_EPOCHS = 3  # Fewer epochs show times, but neither a result nor a curve.


def timed(group, row, found):
    """(Row, baseline) whose times represent those of `row` of `group`; from `group` itself if there are no better ones.

    found: all Groups of the study. The short runs must have the same settings on the same machine, with as many seeds.
    """
    base = group.baseline(row)
    needed = min(len(each.runs) for each in (row, base or row))
    for other in found:
        alike = next((each for each in other.rows if _key(each) == _key(row)), None)
        short = [alike, alike and other.baseline(alike)]
        if None not in short and _stands_for(other, group) and min(len(each.runs) for each in short) >= needed:
            return tuple(short)
    return row, base


def in_turn(row, base):
    """Whether the runs of two Rows were made in turn, as far as their dates, those of their ends, tell: whether the
    spans of time overlap. None if one of them has a single run or an unknown date."""
    ends = [sorted(run.machine.get("date") or "" for run in each.runs) for each in (row, base)]
    if any(len(each) < 2 or not each[0] for each in ends):
        return None
    return max(first for first, *_ in ends) <= min(last for *_, last in ends)


def _stands_for(short, group):
    lengths = {"num_epoch": None}
    same = short.machine == group.machine and short.settings | lengths == group.settings | lengths
    shared = _keys(short) & _keys(group)
    return same and len(shared) > 1 and epochs(short) < min(FEW_EPOCHS, epochs(group))


def _keys(group):
    return {_key(row) for row in group.rows}


def _key(row):
    """What a Row of long runs and one of short runs of the same set-up share."""
    return row.arm.label, row.keys, row.flags.get("batch_size")


def epochs(group):
    """The number of epochs of the longest run of a Group."""
    return max(len(run.epochs) for row in group.rows for run in row.runs)


def accuracy_by_seconds(group, found):
    """For each Row of `group`, for each of its runs [(seconds since its start, test accuracy in percent), ...], one
    point per epoch.

    If the baseline and another Row have short runs, the seconds follow the pace of the short run with the same seed:
    start-up once, then epochs with their evaluation and saving; [] for runs without one. Otherwise they come from the
    runs' own clocks.
    """
    own = [[run.accuracy_by_seconds() for run in row.runs] for row in group.rows]
    paces = [_paces(row, timed(group, row, found)[0]) for row in group.rows]
    paced = [row for row, each in zip(group.rows, paces, strict=True) if each]
    if len(paced) < 2 or group.baseline(group.rows[0]) not in paced:
        return own
    return [_at(row_paces, curves) for row_paces, curves in zip(paces, own, strict=True)]


def _paces(row, short):
    """For each run of `row`, (start-up seconds, seconds per epoch) of the short run with its seed; [] unless each run
    has one."""
    by_seed = {run.arguments.get("seed"): run for run in short.runs} if short is not row else {}
    found = []
    for run in (by_seed.get(run.arguments.get("seed")) for run in row.runs):
        points, start = (run.accuracy_by_seconds(), run.record.get("start_up_seconds")) if run else ([], None)
        if not points or start is None:
            return []
        found.append((start, (points[-1][0] - start) / len(points)))
    return found


def _at(paces, curves):
    if not paces:
        return [[] for _ in curves]
    return [
        [(start + number * seconds, accuracy) for number, (_, accuracy) in enumerate(curve, 1)]
        for curve, (start, seconds) in zip(curves, paces, strict=True)
    ]
