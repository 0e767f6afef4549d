"""The phase table of an Nsight Systems trace, from the SQLite file that `nsys export` writes.

A step is a push/pop range "<label> - step <number>"; the range around it is its epoch; the ranges directly inside a
step, or next to the steps in their epoch, are phases. Ranges nest within a thread and an NVTX domain; those of other
domains, such as Nsight's own for the Python GIL, may begin in one phase and end in another. Schema: the "SQLite Schema
Reference" of the Nsight Systems User Guide; tested with traces of version 2022.4.
"""

import dataclasses
import re
import sqlite3
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

from harness.endings import UserError
from harness.epoch_times import STEP, WARMUP_STEPS, describe_epoch
from reporting.records import warn

# What torch.autograd.profiler.emit_nvtx appends to an operator's name; it differs in every call.
OF_ONE_CALL = re.compile(r", (op_id|seq|stashed seq|sizes|input_op_ids) = .*")
PUSH_POP_EVENTS = (59, 70)  # NvtxPushPopRange, and its imported-text counterpart.
DEVICE_TABLES = ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")
HOW_TO_EXPORT = "make one with: nsys export --type sqlite FILE.nsys-rep"


@dataclasses.dataclass
class Range:
    """A closed NVTX range of one thread; times in nanoseconds."""

    name: str
    start: int
    end: int
    parent: "Range | None" = None

    @property
    def is_step(self):
        return STEP.fullmatch(self.name) is not None

    def around(self):
        """The ranges around this one, the innermost first."""
        outer = self.parent
        while outer:
            yield outer
            outer = outer.parent

    @property
    def is_at_edge(self):
        """Whether it takes no time and lies at the start or the end of its parent, and so perhaps beside it."""
        return self.start == self.end and self.parent is not None and self.end in (self.parent.start, self.parent.end)


def read_trace(path):
    """{process id: [timing of each epoch]} of the trace at `path`; timings are in the form of PhaseTimer.end_epoch.

    Host times are the lengths of the ranges. Device times are how long the GPU worked on what any thread of the process
    launched during the range: backward's kernels are launched by an autograd thread while the range is open in the main
    thread. They are None in a trace without GPU work. UserError if `path` is no such trace.
    """
    path = Path(path)
    if not path.is_file():  # Nor a pipe: opening it would wait forever.
        raise UserError(f"{path} is not a file; {HOW_TO_EXPORT}")
    try:
        database = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            lanes, work = _read_ranges(database, path), _read_device_work(database)
        finally:
            database.close()
    except sqlite3.Error as error:
        raise UserError(f"cannot read the trace {path}: {error}; {HOW_TO_EXPORT}") from None
    chosen, most = {}, {}
    for (thread, _), ranges in lanes.items():
        process, steps = _process(thread), sum(each.is_step for each in ranges)
        if steps and process in most:
            warn(
                f"{path}: process {process} has steps in several threads or domains; using the one with the most steps"
            )
        if steps > most.get(process, 0):
            chosen[process], most[process] = ranges, steps
    timings = {process: _epochs(ranges, work.get(process), path) for process, ranges in chosen.items()}
    if not timings:
        raise UserError(f"{path} has no ranges named '... - step N'; trace a training script of this repository")
    return timings


def _process(thread):
    """The process id in an nsys globalTid, whose bits 24 to 47 hold it."""
    return thread >> 24 & 0xFFFFFF


def _columns(database, table):
    return {row[1] for row in database.execute(f"PRAGMA table_info({table})")}


def _integers(*columns):
    """SQL: whether these columns are integers, which foreign rows may violate."""
    return " AND ".join(f"typeof({column}) = 'integer'" for column in columns)


def _read_ranges(database, path):
    """{(globalTid, domain): [Range, ...]} of all closed ranges by start, each with its parent."""
    columns = _columns(database, "NVTX_EVENTS")
    if not columns:
        raise UserError(f"{path} has no NVTX ranges; record with: nsys profile -t nvtx (or cuda,nvtx)")
    # Registered strings, which the nvtx package uses, are ids; other strings are in the row itself.
    name, names = "event.text", ""
    if "textId" in columns and _columns(database, "StringIds"):
        name, names = "COALESCE(event.text, string.value)", "LEFT JOIN StringIds string ON string.id = event.textId"
    domain = "event.domainId" if "domainId" in columns else "NULL"
    whole = (
        f"({_integers('event.globalTid', 'event.start', 'event.end')} "
        f"AND typeof({name}) IN ('text', 'null') AND event.end >= event.start)"
    )
    source = f"FROM NVTX_EVENTS event {names} WHERE event.eventType IN {PUSH_POP_EVENTS} AND {whole}"
    ((left_out,),) = database.execute(f"SELECT COUNT(*) {source} IS NOT TRUE")
    if left_out:
        warn(f"{path}: ranges left out, as they have not ended, or have no times, thread or name of nsys: {left_out}")
    rows = database.execute(
        f"SELECT event.globalTid, {domain}, {name}, event.start, event.end "
        f"{source} ORDER BY event.start, event.end DESC"
    )
    lanes, open_ranges = defaultdict(list), defaultdict(list)
    for *lane, name, start, end in rows:
        stack = open_ranges[tuple(lane)]
        while stack and stack[-1].end < end:
            stack.pop()
        stack.append(Range(OF_ONE_CALL.sub("", name or ""), start, end, stack[-1] if stack else None))
        lanes[tuple(lane)].append(stack[-1])
    return lanes


def _read_device_work(database):
    """{process id: int64 [n, 3]}: start and end of each piece of GPU work, and when its launch was called."""
    if not _columns(database, "CUPTI_ACTIVITY_KIND_RUNTIME"):
        return {}
    work = defaultdict(list)
    for kind in DEVICE_TABLES:
        table = f"CUPTI_ACTIVITY_KIND_{kind}"
        if not _columns(database, table):
            continue
        rows = database.execute(
            f"SELECT call.globalTid, work.start, work.end, call.start FROM {table} work "
            "JOIN CUPTI_ACTIVITY_KIND_RUNTIME call ON call.correlationId = work.correlationId "
            "AND call.globalTid >> 24 = work.globalPid >> 24 "
            f"WHERE {_integers('call.globalTid', 'work.start', 'work.end', 'call.start')}"
        )
        for thread, *times in rows:
            work[_process(thread)].append(times)
    return {process: np.array(times, dtype=np.int64) for process, times in work.items()}


def _epochs(ranges, work, path):
    """The timing of each epoch in one thread's `ranges`; work: its process's GPU work, or None."""
    steps = [each for each in ranges if each.is_step]
    epochs = {id(step.parent): [] for step in steps}
    _refuse_steps_within(steps, epochs, path)
    left_out, outside = 0, [step.start for step in steps if step.parent is None]  # Of an epoch that has not ended.
    for each in ranges:
        parent = each.parent
        if each.is_at_edge and not parent.is_step and (parent.parent is not None and parent.parent.is_step):
            parent = parent.parent
        if each.is_step:
            epochs[id(parent)].append(each)
        elif parent is not None and parent.is_step and id(parent.parent) in epochs:
            epochs[id(parent.parent)].append(each)
        elif parent is not None and id(parent) in epochs:
            epochs[id(parent)].append(each)
        elif parent is None and outside and each.start >= outside[0] and id(each) not in epochs:
            left_out += 1
    if left_out:
        warn(f"{path}: ranges left out, as they lie beside {len(outside)} steps in no epoch that has ended: {left_out}")
    warm_from = steps[min(WARMUP_STEPS, len(steps)) - 1].end
    timings = [_timing(members, warm_from, work, path) for members in epochs.values()]
    # The ranges are disjoint, but not what they launched. Rounding is not meant.
    if any(timing["unphased_seconds"] < -1e-6 * timing["seconds"] for timing in timings):
        warn(f"{path}: the GPU worked for several phases at once, or after its epoch; the shares add up to above 100 %")
    return timings


def _refuse_steps_within(steps, epochs, path):
    """UserError if a step lies within another, or its epoch within another epoch: their time would count twice."""
    for step in steps:
        for outer in step.around():
            if outer.is_step or (outer is not step.parent and id(outer) in epochs):
                raise UserError(
                    f"{path}: the step '{step.name}' is nested in '{outer.name}', so that its time would count twice; "
                    "record only one loop of steps"
                )


def _refuse_overlaps(ranges, path):
    """UserError if two of the ranges, which lie beside each other, overlap: their shares would add up to anything."""
    for one, other in pairwise(sorted(ranges, key=lambda each: (each.start, each.end))):
        if other.start < one.end:
            raise UserError(
                f"{path}: '{one.name}' and '{other.name}' overlap, which push/pop ranges of one thread cannot; "
                "record and export the trace again"
            )


def _timing(members, warm_from, work, path):
    """The timing of one epoch. members: its steps and phases; those that start before `warm_from` are warm-up."""
    steps = [each for each in members if each.is_step]
    _refuse_overlaps([each for each in members if not each.is_step], path)
    _refuse_overlaps([each for each in members if each.parent is steps[0].parent], path)
    epoch = steps[0].parent
    seconds = (epoch.end - epoch.start if epoch else steps[-1].end - steps[0].start) / 1e9
    if not seconds:
        raise UserError("the trace has steps that take no time; record it again")
    occurrences = defaultdict(list)
    for each in members:
        if not each.is_step:
            occurrences[each.name].append(each)
    occurrences["step"] = steps
    samples = {}
    for name, ranges in occurrences.items():
        host_ms = np.array([each.end - each.start for each in ranges]) / 1e6
        device_ms = None if work is None else _busy_time(ranges, work) / 1e6
        samples[name] = host_ms, device_ms, sum(each.start < warm_from for each in ranges)
    return describe_epoch(seconds, samples, samples["step"][2])


def _busy_time(ranges, work):
    """Nanoseconds that the GPU worked on what was launched during each of `ranges`, which are sorted by start and
    disjoint: int64 [n].

    Concurrent work counts once.
    """
    starts, ends = (np.array([getattr(each, side) for each in ranges]) for side in ("start", "end"))
    owner = np.searchsorted(starts, work[:, 2], side="right") - 1
    inside = (owner >= 0) & (work[:, 2] <= ends[owner])
    busy = np.zeros(len(ranges), dtype=np.int64)
    last_owner = reached = -1
    order = np.lexsort((work[inside, 0], owner[inside]))
    for index, start, end in np.column_stack([owner[inside], work[inside, :2]])[order].tolist():
        if index != last_owner:
            last_owner, reached = index, start
        busy[index] += max(0, end - max(start, reached))
        reached = max(reached, end)
    return busy
