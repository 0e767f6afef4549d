"""The records of benchmarks/: how much faster the new way was in each, and which of its targets that reaches."""

import ast
import functools
import json
from pathlib import Path

from harness import shapes
from harness.shapes import COUNT, NUMBER, PAIR, TEXT, is_number, maybe
from reporting.comparison import number
from reporting.records import machine_letter, provenance, refused, warn
from reporting.tables import markdown
from reporting.verdicts import find_target, judge

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
WITH_TABLES = ("fast", "layout", "memory", "scaling", "searches")
TITLES = {
    ("fast", "ablation"): "Training speed, technique by technique",
    ("fast", "limits"): "Hardware limits against resnext_fast.py",
    ("layout", "totals"): "Grouped convolutions by form and layout",
    ("memory", "rows"): "Activation memory and recomputation",
    ("searches", "searches"): "Searches for candidates, ROUGE in % (mean of ROUGE-1, -2 and -Lsum)",
    ("memory", "annealing"): "The planner against simulated annealing",
    ("memory", "training"): "Training steps with recomputation",
    ("scaling", "rows"): "Time and memory as the work grows, × the row above",
}
MIB = 2**20
RECORD = {
    "benchmark": TEXT, "model": maybe(TEXT), "dataset": maybe(TEXT), "pictures": maybe(COUNT),
    "batch_size": maybe(COUNT),
    "machine": {"hardware": TEXT, "device": maybe(TEXT), "commit": maybe(TEXT), "date": maybe(TEXT)},
}  # fmt: skip
RATIO = {"median": NUMBER, "low": NUMBER, "high": NUMBER, "interval": maybe(PAIR)}
COLUMNS = {  # A record's name for a figure -> its header with the unit, and the factor into that unit.
    "bytes": ("saved, MiB", 1 / MIB),
    "share": ("saved, % of plain", 100),
    "extra": ("FLOPs recomputed, %", 100),
    "extra_found": ("FLOPs recomputed by annealing's plan, %", 100),
    "peak_bytes": ("peak, MiB", 1 / MIB),
    "predicted_bytes": ("predicted saved, MiB", 1 / MIB),
    "predicted_peak_bytes": ("predicted peak, MiB", 1 / MIB),
    "batch_size": ("batch", 1),
    "step_times_plain": ("step, × plain", 1),
    "step_low": ("lowest", 1),
    "step_high": ("highest", 1),
    "peak_allocated_bytes": ("peak allocated, MiB", 1 / MIB),
    "peak_share": ("peak, % of plain", 100),
    "saved_share": ("saved, % of plain", 100),
    "reaches_goal": ("at most 60 % of the peak at 1.10 × the step", 1),
    "pictures_per_second": ("images/s, median round", 1),
    "times_original": ("× original, median over rounds", 1),
    "times_original_low": ("lowest", 1),
    "times_original_high": ("highest", 1),
    "tflops_per_second": ("TFLOP/s", 1),
    "saved_mib": ("saved, MiB", 1),
    "peak_allocated_mib": ("peak allocated, MiB", 1),
    "pflop_an_epoch": ("PFLOP per epoch", 1),
    "matmul_tflops_per_second": ("matrix product, TFLOP/s", 1),
    "matmul_spread": ("product, lowest to highest", 1),
    "convolution_tflops_per_second": ("dense convolution, TFLOP/s", 1),
    "convolution_spread": ("convolution, lowest to highest", 1),
    "copy_gb_per_second": ("copy, GB/s", 1),
    "copy_spread": ("copy, lowest to highest", 1),
    "epoch_seconds": ("epoch, s", 1),
    "arithmetic_floor_seconds": ("epoch at the arithmetic limit, s", 1),
    "bytes_floor_seconds": ("epoch at the memory-traffic limit, s", 1),
    "times_the_larger_floor": ("epoch, × the larger limit", 1),
    "forward_ms": ("forward, ms", 1),
    "backward_ms": ("backward, ms", 1),
    "flops_times": ("FLOPs, ×", 1),
    "milliseconds": ("time, ms", 1),
    "time_times": ("time, ×", 1),
    "time_interval": ("time, 95 % interval", 1),
    "memory_mib": ("memory, MiB", 1),
    "memory_times": ("memory, ×", 1),
    "predicted_step": ("predicted", 1),
    "predicted_within_10_percent": ("within 10 % of predicted", 1),
    "processor_ms_a_document": ("CPU time per document, ms", 1),
    "best_interval": ("best, 95 % interval", 1),
    "chosen": ("SimCLS", 1),
    "times_faster": ("speed, × groups in NCHW", 1),
}


def read(folder, published=False):
    """{hardware: [record, ...]} of the complete records `folder`/*/*.json. Others are named on stderr and left out;
    with `published`, so are those without a clean commit."""
    found = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            warn(f"skipped {path}: not valid JSON ({type(error).__name__}); run its benchmark again, or delete it")
            continue
        fault = shapes.fault(record, RECORD) or _ratio_fault(record)
        if fault is not None:
            warn(f"skipped {path}: not a record of a benchmark: {fault}")
        elif not (published and refused(path, record)):
            letter = machine_letter(path)
            record["machine"]["hardware"] += f", machine {letter}" if letter else ""
            found.setdefault(record["machine"]["hardware"], []).append(record)
    return found


def _ratio_fault(record):
    faults = (shapes.fault(ratio, RATIO, f"the ratio {case}".strip()) for case, ratio in _ratios("", record))
    return next(filter(None, faults), None)


def render(found):
    """Markdown: for each hardware a table of ratios. found: the records, as returned by `read`."""
    parts = []
    for hardware, records in found.items():
        rows = [row for record in records for row in _ratio_rows(record)]
        if rows:
            parts += [f"{hardware}; the two sides of a row alternate for n rounds within one run:", markdown(rows)]
    return "\n\n".join(parts)


def render_tables(found, benchmark):
    """Markdown: the tables contained in the records of `benchmark`, one of WITH_TABLES. found: as for `render`."""
    parts = []
    for records in found.values():
        for record in records:
            if record["benchmark"] == benchmark:
                for name, rows in _tables(record):
                    parts += [_caption(record, name, rows), markdown([_cells(row, rows) for row in rows])]
    return "\n\n".join(parts)


def _ratio_rows(record):
    targets, machine = _targets(record["benchmark"]), record["machine"]
    for case, ratio in _ratios("", record):
        if ratio["low"] == ratio["high"] == 1:
            continue  # The ratio of a side to itself.
        case = ", ".join(filter(None, [record.get("model"), case]))
        bound, limit = find_target(targets, machine.get("device"), machine["hardware"], case) or (None, None)
        row = {
            "Benchmark": f"`{record['benchmark']}`",
            "Case": case + " (a cost)" * (bound == "at most") or None,
            "n": str(rounds(record)) if rounds(record) else None,
            "Ratio": number(ratio["median"]),
            "95 % interval": " to ".join(map(number, ratio["interval"])) if ratio.get("interval") else None,
            "Lowest to highest": f"{number(ratio['low'])} to {number(ratio['high'])}",
        }
        if bound:
            reached = judge(bound, limit, ratio["interval"]) if ratio.get("interval") else "too few rounds"
            row |= {"Target": f"{bound} {limit:g}", "Reached": reached}
        yield row | {"Made by": provenance([record]) or None}


def rounds(record):
    """How often each side of a benchmark ran; None if its record does not say."""
    found = record.get("rounds")
    return found if is_number(found) else _length_of_seconds(record)


def _length_of_seconds(value):
    """The number of rounds for which a record stores an arm's seconds, anywhere in it; None if it stores none."""
    if not isinstance(value, dict):
        return None
    seconds = value.get("seconds")
    for kept in seconds.values() if isinstance(seconds, dict) else ():
        if isinstance(kept, list):
            return len(kept)
    return next(filter(None, map(_length_of_seconds, value.values())), None)


@functools.cache
def _targets(benchmark):
    """TARGETS of the script of `benchmark`, as for verdicts.find_target; {} without any."""
    try:
        script = ast.parse((SCRIPTS / f"{benchmark}.py").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return {}
    for statement in script.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "TARGETS":
            return ast.literal_eval(statement.value)
    return {}


def _ratios(name, value):
    """Yield (where, ratio) for every {"median", "low", "high"} in a record, as made by benchmarks/common.py."""
    if not isinstance(value, dict):
        return
    if {"median", "low", "high"} <= value.keys():
        yield name, value
        return
    for key, part in value.items():
        # These names add nothing to the heading.
        word = "" if key in ("results", "ratio", "ratios") else key
        yield from _ratios(", ".join(filter(None, [name, word])), part)


def _tables(record):
    """Yield (name, rows) for every list of dicts in a record: tables whose plain values are shown as they are."""
    for name, value in record.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            yield name, value


def _caption(record, name, rows):
    """ "Activation memory: resnext29_4x64d, AMD EPYC, 2 cores, batch 4:", without what a column already shows."""
    title = TITLES.get((record["benchmark"], name), f"{record['benchmark']}, {name}")
    facts = {"model": "{model}", "pictures": "{dataset} ({pictures:,} images)", "batch_size": "batch {batch_size}"}
    known = {"dataset": "data"} | record
    words = {key: text.format(**known) for key, text in facts.items() if record.get(key) and key not in rows[0]}
    words = [words.get("model"), words.get("pictures"), record["machine"]["hardware"], words.get("batch_size")]
    made = provenance([record])
    of_rounds = {"times_original", "time_times", "step_times_plain"} & rows[0].keys()
    times = f"n = {rounds(record)} rounds" if rounds(record) and of_rounds else None
    return f"{title}: {'; '.join(filter(None, [', '.join(filter(None, words)), times, made]))}:"


def _cells(row, rows):
    """A row of a table, header -> text or None, with those of its figures that are plain in all `rows`."""
    names = dict.fromkeys(key for each in rows for key in each)
    plain = [key for key in names if all(isinstance(each.get(key), (str, int, float, type(None))) for each in rows)]
    return dict(_cell(key, row.get(key)) for key in plain)


def _cell(key, value):
    header, factor = COLUMNS.get(key, (key.replace("_", " "), 1))
    if isinstance(value, bool):
        return header, "yes" if value else "no"
    if value is None or isinstance(value, str):
        return header, value
    return header, str(value) if factor == 1 and isinstance(value, int) else number(factor * value)
