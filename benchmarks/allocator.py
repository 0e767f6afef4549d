"""The speed-up of CPU training when the process keeps the memory of freed tensors. Targets: TARGETS.

    python3 benchmarks/allocator.py

Two processes take training steps in turn, as the original does and as resnext_fast.py does; one of the two keeps freed
memory (harness.memory.keep_freed_memory). Both must reach the same weights. Besides the times, the record has the page
faults per step (for each, the system clears a page) and the peak memory of each process.
"""

import contextlib
import functools
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import CPU, Reference, check, finish, get_parser, interleaved, new_record, ratio_summary

import torch
from fast_steps import ORIGINAL, TrainingSteps, random_pictures
from resnext_fast import get_fast_args_parser

from experiment import model_name
from harness import arguments, endings
from harness.memory import keep_freed_memory

WAYS = {"original": [*ORIGINAL.split(), "--num_workers", "0"], "resnext_fast.py": ["--channels_last", "True"]}
SIDES = ("given back", "kept")
TARGETS = {"cpu": {"resnext29_2x4d, original": ("at least", 1.2), "resnext29_2x4d, resnext_fast.py": ("at least", 1.1)}}


def get_args_parser():
    parser = get_parser(__doc__, "allocator", rounds=9)
    add = parser.add_argument
    add("--model", type=model_name, default="resnext29_2x4d")
    add("--batch_size", type=arguments.positive_int, default=128)
    add("--steps", type=arguments.positive_int, default=4, help="training steps per side and round")
    add("--threads", type=arguments.positive_int, default=1)
    add("--side", choices=SIDES, help="run as this side of a comparison (internal)")
    return parser


def main():
    args = get_args_parser().parse_args()
    if args.side:
        take_steps(args)
        return
    settings = {name: getattr(args, name) for name in ("model", "batch_size", "steps", "rounds", "threads")}
    record = new_record("allocator", CPU, **settings, results={})
    for way in WAYS:
        record["results"][way] = compare(way, args)
    finish(record, args)


def compare(way, args):
    """Time both sides of a way to train in turn; returns their measurements, a dict."""
    command = ["--model", args.model, "--batch_size", args.batch_size, "--steps", args.steps, "--threads", args.threads]
    with contextlib.ExitStack() as processes:
        sides = {
            name: processes.enter_context(Reference(sys.executable, "allocator.py", *command, "--side", name))
            for name in SIDES
        }
        answers = {name: side.ask(way) for name, side in sides.items()}  # Also warms up.
        check_equal(way, answers)

        def run(name):
            answers[name] = sides[name].ask(way)
            return answers[name]["seconds"]

        seconds = interleaved({name: functools.partial(run, name) for name in SIDES}, args.rounds)
    check_equal(way, answers)
    faults, peaks = ({name: answers[name][key] for name in SIDES} for key in ("faults_a_step", "peak_mib"))
    both = (" and ".join(f"{each[name]:.0f}" for name in SIDES) for each in (faults, peaks))
    print("{}: {}: page faults per step {}; peak memory {} MiB".format(way, " and ".join(SIDES), *both), flush=True)
    ratio = ratio_summary(*(seconds[name] for name in SIDES))
    return {"seconds": seconds, "ratio": ratio, "faults_a_step": faults, "peak_mib": peaks}


def check_equal(way, answers):
    """Raise AssertionError unless both sides have the same weights."""
    one, other = (answers[name]["weights"] for name in SIDES)
    check(one == other, f"{way}: the two sides' weights differ")


def take_steps(args):
    """For each line on stdin (a name of WAYS, as JSON), take args.steps training steps and answer with a JSON line."""
    if args.side == "kept":
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    print(json.dumps({"name": args.side}), flush=True)
    data, made = random_pictures(max(1000, args.batch_size), 32), {}
    for line in sys.stdin:
        way = json.loads(line)
        if way not in made:
            words = ["--model", args.model, "--batch_size", str(args.batch_size), "--grouped_convolution", "groups"]
            words += ["--device", "cpu"]  # Else, on a machine with a GPU, other techniques are on by default.
            made[way] = TrainingSteps(get_fast_args_parser().parse_args([*words, *WAYS[way]]), data, CPU)
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        made[way].run(args.steps)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        weights = sum(float(weight.detach().double().square().sum()) for weight in made[way].model.parameters())
        answer = {"seconds": seconds, "weights": weights}
        answer |= {"faults_a_step": (after.ru_minflt - before.ru_minflt) / args.steps}
        print(json.dumps(answer | {"peak_mib": after.ru_maxrss / 1024}), flush=True)


if __name__ == "__main__":
    endings.run(main)
