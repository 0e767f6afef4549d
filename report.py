#!/usr/bin/env python3
"""Every table and figure of the study, from the records that its runs left.

    python3 report.py                          tables in Markdown on stdout, figures in figures/ beside the runs
    python3 report.py --only data-loader evaluation    some of the tables; the figures all the same
    python3 report.py --readme                 the tables of the published records, between their markers in README.md,
                                               and the figures in image/
    python3 report.py --phases RECORD.json     the phases of one run in full
    python3 report.py --nsys TRACE.sqlite      the same of an Nsight Systems trace, exported to SQLite

A table's markers are <!-- report:NAME --> and <!-- /report:NAME -->.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from harness import arguments, endings
from harness.endings import UserError
from reporting import benchmarks, overview, records, studies, tables
from reporting.readme import rewrite

FOLDERS = ("runs", "model_history", "resnext/model_history", "SimCLS/cache")
PUBLISHED = "benchmarks/results/*/runs"  # What README shows: records that were copied there to be kept.
GLOSSARY = ROOT / "reporting" / "glossary.md"
STUDIES = (studies.DATA_LOADER, studies.MIXED_PRECISION, studies.CHECKPOINTING, studies.SIMCLS)
TABLES = (
    "runs",
    *(study.name for study in STUDIES),
    "evaluation",
    "phases",
    "benchmarks",
    *(f"benchmark-{name}" for name in benchmarks.WITH_TABLES),
    "published",
    "glossary",
)


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="*", type=Path,
        help=f"folders with records; by default {', '.join(FOLDERS)}, and for --readme {PUBLISHED}")  # fmt: skip
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--readme", type=Path, nargs="?", const=ROOT / "README.md", metavar="FILE",
        help="rewrite the tables in FILE, by default README.md")  # fmt: skip
    instead.add_argument("--only", nargs="+", metavar="TABLE", choices=TABLES, help=f"print these: {', '.join(TABLES)}")
    instead.add_argument("--phases", type=Path, metavar="RECORD", help="print the phases of one run")
    instead.add_argument("--nsys", type=Path, metavar="TRACE", help="print the phases of an exported trace")
    add("--image_dir", type=Path,
        help="where the figures go; by default figures/ in the first folder, for --readme image/")  # fmt: skip
    add("--benchmark_dir", type=Path, default=ROOT / "benchmarks" / "results", help="where the benchmarks' records are")
    return parser


def main():
    args = get_args_parser().parse_args()
    if args.nsys:
        print_trace(args.nsys)
    elif args.phases:
        print_phases(args.phases)
    else:
        report(args)


def report(args):
    folders = args.folders or default_folders(published=args.readme is not None)
    runs, evaluations = records.read_folders(folders)
    if not runs:
        records.warn("no runs found; bash run.sh makes some")
    from reporting import figures, frontier  # After the folders are known to be good: matplotlib takes a second.

    measured = benchmarks.read(args.benchmark_dir)
    parts = sections(runs, evaluations, measured, with_cpu_times=args.readme is None)
    if args.readme:
        rewrite(args.readme, {name: body for name, (_, body) in parts.items()})
    else:
        shown = [parts[name] for name in args.only or TABLES]
        print("\n\n".join(f"## {title}\n\n{body}" for title, body in shown if body))
    image_dir = args.image_dir or (ROOT / "image" if args.readme else beside(folders))
    drawn = [*figures.draw_all(runs, image_dir), *frontier.draw_frontier(measured, image_dir)]
    for path in drawn:
        print(f"drawn: {path}", file=sys.stderr)


def default_folders(published):
    if published:
        return sorted(ROOT.glob(PUBLISHED))
    return [ROOT / name for name in FOLDERS if (ROOT / name).is_dir()]


def beside(folders):
    """Where the figures of one's own runs go: image/ is for those of the published records."""
    first = folders[0] if folders else ROOT / FOLDERS[0]
    return (first if first.is_dir() else first.parent) / "figures"


def sections(runs, evaluations, measured, with_cpu_times):
    """Name of TABLES -> (title, Markdown), with "" where there are no records for it.

    measured: the benchmarks' records, as benchmarks.read gives them.
    """
    parts = {"runs": ("Runs", overview.every_run(runs, with_cpu_times))}
    for study in STUDIES:
        parts[study.name] = (study.title, tables.render(study, runs, with_cpu_times))
    parts["evaluation"] = ("SimCLS before and after", overview.evaluations(evaluations))
    parts["phases"] = ("Phases of a step", overview.step_phases(runs, with_cpu_times))
    parts["benchmarks"] = ("Benchmarks", benchmarks.render(measured))
    for name in benchmarks.WITH_TABLES:
        parts[f"benchmark-{name}"] = (f"Benchmark {name}", benchmarks.render_tables(measured, name))
    parts["published"] = ("The original study", overview.original_study())
    parts["glossary"] = ("What the figures mean", GLOSSARY.read_text(encoding="utf-8").strip())
    return parts


def print_phases(path):
    runs, _ = records.read_folders([path])
    if not runs or not runs[0].epochs:
        raise UserError(f"{path} is no record of a training run with an epoch in it")
    print(overview.phase_table(runs[0].timing()))


def print_trace(path):
    from reporting import nsys

    for process, timings in nsys.read_trace(path).items():
        print(f"process {process}, {sum(timing['steps'] for timing in timings)} steps:\n")
        print(overview.phase_table(records.combine(timings)))


if __name__ == "__main__":
    endings.run(main)
