"""Every script that works for long, on the smallest inputs, and what its files must hold after whatever happened."""

import json
import time
from typing import NamedTuple

import launch
import tiny_inputs
from launch import ROOT

# Counts, in the script's process, the changes to files below the current folder, and writes the number in the end.
COUNT_CHANGES = """
import atexit, os, sys
here, process, seen = os.getcwd(), os.getpid(), 0

def changes_a_file(event, args):
    if event == "open":
        path, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
        return writes and isinstance(path, str) and os.path.abspath(path).startswith(here)
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

def watch(event, args):
    global seen
    if event[0] == "o" and os.getpid() == process and changes_a_file(event, args):
        seen += 1
        at_change(seen)

def at_change(number):
    pass

sys.addaudithook(watch)
"""
TELL_CHANGES = """
def tell():
    with open({path!r}, "w") as file:
        file.write(str(seen))
atexit.register(tell)
"""


class Experiment(NamedTuple):
    """A script with its arguments, which write below the current folder alone.

    go_on: what is added to them to go on after a fault; anew: to do the work again where it is done. overwrites:
    whether it does its work anew when its files are there. workers: the arguments that give it worker processes.
    model: it has one, on whatever device there is. processes: torchrun can share it out.
    """

    name: str
    args: list
    go_on: tuple = ()
    anew: tuple = ()
    overwrites: bool = True
    workers: tuple = ()
    model: bool = True
    processes: bool = False

    @property
    def script(self):
        return f"{'resnext' if self.name.startswith('resnext') else 'SimCLS'}/{self.name}"


class Undisturbed(NamedTuple):
    """What an experiment does when nothing happens: its files, how long it takes, how often it changes files."""

    files: dict
    seconds: float
    changes: int


def experiments(inputs):
    """All Experiments, on inputs that are made in the folder `inputs`."""
    pictures = tiny_inputs.make_pictures(inputs / "pictures")
    samples = tiny_inputs.make_samples(inputs / "samples")
    model = inputs / "t5"
    made = launch.run("tests/tiny_inputs.py", model, "t5", 0.1, cwd=inputs)  # Where transformers is imported already.
    if made.code != 0:
        raise RuntimeError(made.err)
    table = tiny_inputs.make_table(inputs / "papers.csv")
    candidates = tiny_inputs.make_candidates(inputs / "candidates", 60, 3)
    resnext = ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 8,
               "--num_worker", 0, "--num_epoch", 4, "--lr", 0.002, "--save_every", 0]  # fmt: skip
    layout = ["--channels_last", True, "--grouped_convolution", "groups"]  # Else measured, and not the same each time.
    again = {"go_on": ("--resume",), "anew": ("--restart",)}
    image_script = {**again, "workers": ("--num_worker", 2)}
    found = [
        Experiment("resnext.py", resnext, processes=True, **image_script),
        # Not a budget: its plan follows measured times, and is not the same each time.
        Experiment("resnext_checkpoint.py", [*resnext, "--policy", "block"], **image_script),
        Experiment("resnext_fast.py", [*resnext, *layout], **again, workers=("--loader", "workers", "--num_worker", 2)),
        Experiment(
            "finetune_model.py",
            [
                "--pt_model",
                model,
                "--data_file",
                table,
                "--save_dir",
                "tuned",
                "--num_epoch",
                3,
                "--batch_size",
                8,
                "--max_source_length",
                24,
                "--max_target_length",
                8,
            ],
            **again,
        ),  # fmt: skip
        Experiment(
            "gen_candidate.py",
            [
                "--generator_name",
                model,
                "--dataset_name",
                table,
                "--num_cands",
                4,
                "--decoder_max_len",
                8,
                "--cand_gen_batch",
                3,
            ],
            overwrites=False,
            processes=True,
        ),  # fmt: skip
        Experiment(
            "preprocess.py",
            ["--src_dir", candidates, "--tgt_dir", "samples", "--split", "train", "--cand_num", 3, "--workers", 1],
            workers=("--workers", 2),
            model=False,
        ),
        Experiment(
            "main.py",
            [
                "--dataset",
                samples,
                "--model_type",
                model,
                "--num_workers",
                0,
                "--num_epoch",
                3,
                "--batch_size",
                4,
                "--accumulate_step",
                3,
                "--lr",
                0.002,
                "--eval_freq",
                2,
                "--total_len",
                60,
                "--max_len",
                20,
                "--dropout",
                0.1,
            ],
            **again,
            workers=("--num_workers", 2),
            processes=True,
        ),  # fmt: skip
    ]
    return [experiment for experiment in found if (ROOT / experiment.script).exists()]


# ------------------------------------------------------------------------------------------------ what is compared


def snapshot(folder):
    """{path: content} of every file below `folder` but locks; of records what neither clock nor --resume changes."""
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    # training_args.bin has the time in it.
    return {str(path.relative_to(folder)): _content(path) for path in names if path.name != "training_args.bin"}


def _content(path):
    if path.suffix == ".state":
        return b""  # Its history has times in it.
    content = path.read_bytes()
    if path.suffix != ".json":
        return content
    try:
        return _lasting(json.loads(content))
    except ValueError:
        return content


def _lasting(value):
    """A JSON value without what differs between two runs that compute the same."""
    if isinstance(value, list):
        return [_lasting(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _lasting(each) for name, each in value.items() if not _is_passing(name, value)}


def _is_passing(name, values):
    # The Trainer's history, which counts in steps, has the mean training loss since it was started.
    trainers = "step" in values and name in ("loss", "train_loss")
    named = name in ("timing", "peak_memory", "machine", "resume", "restart", "grad_norm", "total_flos")
    return trainers or named or name.endswith(("_runtime", "_per_second", "_seconds"))


def undisturbed(experiment, folder):
    """The Undisturbed run of an Experiment in the empty `folder`."""
    counter = folder.with_name(folder.name + ".changes")
    before = COUNT_CHANGES + TELL_CHANGES.format(path=str(counter))
    started = time.perf_counter()
    script = launch.run(experiment.script, *experiment.args, cwd=folder, before=before)
    seconds = time.perf_counter() - started
    if script.code != 0:
        raise RuntimeError(f"{experiment.name} does not even end when nothing happens: {script.err}")
    return Undisturbed(snapshot(folder), seconds, int(counter.read_text()))
