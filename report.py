#!/usr/bin/env python3
"""Every table and figure of the study, from the records of its runs.

    python3 report.py                          tables in Markdown on stdout, figures in image/ next to the runs
    python3 report.py --only data-loader evaluation    some of the tables; all of the figures
    python3 report.py --readme                 the tables of the published records, between their markers in README.md
                                               and docs/, and the figures in image/
    python3 report.py --compare A B            two runs, or two folders of seeds: what differs, and whether it is noise
    python3 report.py --phases RECORD.json     the phases of one run in full
    python3 report.py --timeline A.json.gz B.json.gz    where the time of a step goes, from files of --trace
    python3 report.py --nsys TRACE.sqlite      the phases of an Nsight Systems trace, exported to SQLite

A table's markers are <!-- report:NAME --> and <!-- /report:NAME -->.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from harness import arguments, endings
from harness.endings import UserError
from reporting import accuracy, benchmarks, headline, loops, overview, records, sentences, studies, tables, terminal
from reporting.named import read_runs
from reporting.pages import pages, rewrite

FOLDERS = ("runs", "model_history", "resnext/model_history", "SimCLS/cache")
PUBLISHED = "benchmarks/results/*/runs"  # What the README shows: records that were copied there to be kept.


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    add = parser.add_argument
    add("folders", nargs="*", type=Path,
        help=f"folders with records; by default {', '.join(FOLDERS)}, and for --readme {PUBLISHED}")  # fmt: skip
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--readme", type=Path, nargs="?", const=ROOT, metavar="FOLDER",
        help="rewrite the generated parts of README.md and docs/ in FOLDER, by default this repository")  # fmt: skip
    names = list(sections([], [], {}, with_cpu_times=True))
    instead.add_argument("--only", nargs="+", metavar="TABLE", choices=names, help=f"print these: {', '.join(names)}")
    instead.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"),
        help="compare two runs in a table and a figure; each a record, or a folder of seeds")  # fmt: skip
    instead.add_argument("--phases", type=Path, metavar="RECORD", help="print the phases of one run")
    instead.add_argument("--timeline", type=Path, nargs="+", metavar="TRACE",
        help="print and draw where the time of a step goes, from files written by --trace")  # fmt: skip
    instead.add_argument("--nsys", type=Path, metavar="TRACE", help="print the phases of an exported trace")
    add("--markdown", action="store_true", help="print Markdown to a terminal, too, as when piped")
    add("--image_dir", type=Path,
        help="where the figures go; by default image/ in the first folder, or in that of --readme")  # fmt: skip
    add("--benchmark_dir", type=Path, default=ROOT / "benchmarks" / "results", help="where the benchmark records are")
    return parser


def main():
    parser = get_args_parser()
    args = parser.parse_args()
    if args.folders and (args.nsys or args.phases or args.timeline or args.compare):
        parser.error(
            f"{args.folders[0]}: --nsys, --phases, --timeline and --compare take no other folder; leave it out"
        )
    if args.image_dir and args.image_dir.resolve() == ROOT / "image" and not args.readme:
        parser.error("--image_dir: only --readme draws in this repository's image/; choose another folder")
    if args.image_dir and (args.nsys or args.phases):
        parser.error("--image_dir: --nsys and --phases draw nothing; leave it out")
    aligned = not args.markdown and sys.stdout.isatty()

    def show(text):
        print(terminal.aligned(text) if aligned else text, flush=True)  # In one file with stderr, the lines stay whole.

    if args.nsys:
        print_trace(args.nsys, show)
    elif args.phases:
        print_phases(args.phases, show)
    elif args.timeline:
        print_timeline(args, show)
    elif args.compare:
        compare_two(args, show)
    else:
        report(args, show)


def report(args, show):
    folders = args.folders or default_folders(published=args.readme is not None)
    runs, evaluations = records.read_folders(folders, published=args.readme is not None)
    if not runs:
        records.warn("no runs found; bash run.sh trains some")
    from reporting import figures  # Only once the folders are known to be good: importing matplotlib takes a second.

    measured = benchmarks.read(args.benchmark_dir, published=args.readme is not None)
    parts = sections(runs, evaluations, measured, with_cpu_times=args.readme is None)
    if args.readme:
        bodies = {name: body for name, (_, body) in parts.items()} | page_parts(runs, evaluations, measured)
        rewrite(pages(args.readme), bodies, args.readme)
    else:
        shown = [parts[name] for name in args.only or parts]
        show("\n\n".join(f"## {title}\n\n{body}" for title, body in shown if body))
        show("\nThe terms are explained in docs/glossary.md.")
    for path in figures.draw_all(runs, measured, args.image_dir or (args.readme or beside(folders)) / "image"):
        print(f"drawn: {path}", file=sys.stderr)


def default_folders(published):
    if published:
        return sorted(ROOT.glob(PUBLISHED))
    return [ROOT / name for name in FOLDERS if (ROOT / name).is_dir()]


def beside(folders):
    """The folder whose image/ receives the figures of the user's own runs; the repository's is for published
    records."""
    if not folders:
        return ROOT / FOLDERS[0]
    return folders[0] if folders[0].is_dir() else folders[0].parent


def sections(runs, evaluations, measured, with_cpu_times):
    """Name of each table -> (title, Markdown), with "" if there are no records for it.

    measured: the benchmarks' records, as returned by benchmarks.read.
    """
    parts = {"runs": ("Runs", overview.every_run(runs, with_cpu_times))}
    parts["headline"] = ("What each technique buys", headline.render(runs))
    for study in studies.STUDIES:
        parts[study.name] = (study.title, tables.render(study, runs, with_cpu_times))
    parts["time-to-accuracy"] = ("Time to accuracy", accuracy.render(runs, with_cpu_times))
    parts["evaluation"] = ("SimCLS before and after", overview.evaluations(evaluations))
    parts["phases"] = ("Phases of a step", overview.step_phases(runs, with_cpu_times))
    parts["benchmarks"] = ("Benchmarks", benchmarks.render(measured))
    for name in benchmarks.WITH_TABLES:
        parts[f"benchmark-{name}"] = (f"Benchmark {name}", benchmarks.render_tables(measured, name))
    parts["published"] = ("The original study", overview.original_study())
    return parts


def page_parts(runs, evaluations, measured):
    """Name -> Markdown: the generated parts of the pages besides the tables of `sections`."""
    parts = {f"headline-{page}": headline.render(runs, page) for page in headline.PAGES}
    parts |= {"bullets": sentences.bullets(runs, evaluations), "faults": sentences.faults(measured)}
    return parts | {f"loop-{name}": loops.difference(f"resnext_{name}.py") for name in ("checkpoint", "fast")}


def compare_two(args, show):
    from reporting import compare

    sides = [compare.read_side(path) for path in args.compare]
    show(compare.render(sides))
    path = compare.draw(sides, (args.image_dir or beside([args.compare[1]]) / "image") / "compare.png")
    print(f"drawn: {path}", file=sys.stderr)


def print_phases(path, show):
    runs = [run for run in read_runs(path) if run.timed_epochs]
    if not runs:
        raise UserError(f"{path} is not a record of a training run with an epoch in it that it timed itself")
    if len(runs) > 1:
        raise UserError(f"{path} has {len(runs)} runs; choose one: {', '.join(run.path.name for run in runs)}")
    epochs = len(runs[0].timed_epochs)
    show(f"{runs[0].path}, {epochs} epoch{'s' * (epochs > 1)}:\n\n{overview.phase_table(runs[0].timing())}")


def print_timeline(args, show):
    from reporting import timeline

    traces = [timeline.read_trace(path) for path in args.timeline]
    show(timeline.render(traces))
    path = timeline.draw(traces, (args.image_dir or args.timeline[0].parent / "image") / "timeline.png")
    print(f"drawn: {path}", file=sys.stderr)


def print_trace(path, show):
    from reporting import nsys

    for process, timings in nsys.read_trace(path).items():
        steps = sum(timing["steps"] for timing in timings)
        show(f"process {process}, {steps} steps:\n\n{overview.phase_table(records.combine(timings))}")


if __name__ == "__main__":
    endings.run(main)
