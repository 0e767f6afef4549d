#!/usr/bin/env python3
"""Train ResNeXt on small images with everything on: the loop of resnext.py with the techniques that pay off together.

Images are augmented on the device, in the model's layout and dtype. The dtype is bfloat16 if the processor multiplies
it natively, float16 on GPUs before Ampere, and float32 on a CPU without such instructions. The memory layout and the
form of the grouped convolutions are the fastest ones here, measured in about a second (not with --deterministic, or if
flags set both). On CUDA the model is compiled; on a CPU --keep_memory is on. Muon, which is SGD with Nesterov momentum
and orthogonalised updates of the convolutions (muon.py), follows one cycle to zero, with label smoothing and no weight
decay on BatchNorm and biases. Each technique can be switched off, down to the settings of resnext.py: --loader workers
--half_precision False --channels_last False --grouped_convolution groups --compile False --keep_memory False
--optimizer adam --label_smoothing 0.

benchmarks/fast.py measures the effect of each technique, with and without bfloat16 instructions. docs/results.md lists
the results for each processor that has a record, under "Benchmarks". Not yet measured: a GPU, and ResNeXt29_4x64d at
full length.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import torch
from torch import nn

from experiment import Metrics, conduct, evaluate, get_args_parser, load_parts, training_batches
from harness import devices, endings
from harness.arguments import FLAG, OneLineParser, learning_rate, share_below_one
from harness.loading import largest_batch
from harness.machine import multiplies_bfloat16
from harness.memory import SavedBytes
from harness.planning import StepCost
from harness.precision import add_half_precision
from harness.timing import PhaseTimer
from layouts import choose_layout
from memory_plan import add_budget_arguments, compare_with_plan, plan_memory, policy_label
from models.grouped_convolution import FORMS
from models.resnext import ResNeXt
from models.resnext_checkpoint import CheckpointResNeXt
from muon import Muon

WARMUP = 0.2  # The share of training in which the learning rate rises.
LEARNING_RATES = {"muon": 0.1, "sgd": 0.1, "adam": 0.01}  # Defaults of --lr.
SWITCHES = (
    "channels_last", "grouped_convolution", "compile", "max_autotune", "cuda_graphs", "optimizer", "label_smoothing",
    "keep_memory",
)  # fmt: skip


class FastParser(OneLineParser):
    """A OneLineParser that resolves arguments that depend on each other and on the requested device. An argument that
    is added again replaces the earlier one."""

    def __init__(self, **more):
        super().__init__(conflict_handler="resolve", **more)

    def parse_known_args(self, *texts):
        args, unknown = super().parse_known_args(*texts)
        if "half_precision" not in args:
            args.half_precision = fast_type(args.device or devices.kind(args))
        if args.compile is None:
            args.compile = devices.kind(args) == "cuda"
        if args.keep_memory is None:
            args.keep_memory = devices.kind(args) == "cpu"
        for name in ("max_autotune", "cuda_graphs"):
            if getattr(args, name) and not args.compile:
                self.error(f"--{name} needs a compiled model; add --compile")
        if args.compile and args.policy == "nested":
            self.error("--policy nested cannot be compiled; add --compile False, or choose another policy")
        if args.lr is None:
            args.lr = LEARNING_RATES[args.optimizer]
        return args, unknown


def get_fast_args_parser():
    parser = get_args_parser(__doc__, FastParser)
    parser.set_defaults(loader="device", num_epoch=30, keep_memory=None)
    switch = FLAG | {"default": None}
    add = parser.add_argument
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items())
    add("--lr", type=learning_rate, help=f"peak learning rate, or adam's constant one; by default {rates}")
    add_half_precision(parser, "autocast; by default in the type that the device is fast in, if any",
                       default=argparse.SUPPRESS, metavar="float16|bfloat16|False")  # fmt: skip
    add("--channels_last", **switch, help="store images and convolution weights as NHWC; by default the fastest here")
    add("--grouped_convolution", choices=FORMS,
        help="form in which the grouped convolutions run; by default the fastest here")  # fmt: skip
    add("--compile", **switch, help="torch.compile the model; by default on CUDA only")
    add("--max_autotune", **FLAG, help="with --compile, time more kernels for each operator; compiling takes minutes")
    add("--cuda_graphs", **FLAG, help="with --compile, launch its kernels as CUDA graphs")
    add("--optimizer", choices=LEARNING_RATES, default="muon", help="muon, which is sgd with orthogonalised updates of "
        "the convolutions, or sgd, both in one cycle; or adam at a constant rate as in resnext.py")  # fmt: skip
    add("--label_smoothing", type=share_below_one, default=0.1, help="weight of the uniform distribution in the target")
    add_budget_arguments(parser, policy=None)
    return parser


def fast_type(device):
    """The half precision that `device`, such as "cpu" or "cuda:1", is fast in, or None. On GPUs, fast bfloat16 products
    came with Ampere. "cuda" stands for all GPUs."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return "bfloat16" if kind == "cpu" and multiplies_bfloat16() else None
    gpus = [gpu for gpu in range(torch.cuda.device_count()) if number in ("", str(gpu))]
    capabilities = [torch.cuda.get_device_capability(gpu) for gpu in gpus]
    return "float16" if capabilities and min(capabilities) < (8, 0) else "bfloat16"


def main():
    args = get_fast_args_parser().parse_args()
    torch.backends.cudnn.benchmark = not args.deterministic
    length = "the learning rate follows one cycle over all epochs" if args.optimizer != "adam" else None
    policy = {"policy": policy_label(args)} if policy_label(args) else {}
    conduct(args, "resnext_fast", suffix(args), train, fixed_length=length, **policy)


def suffix(args):
    """The end of the name of a run's files: "_fast", then whatever differs from this device's defaults."""
    defaults = get_fast_args_parser().parse_args(["--device", devices.kind(args)])
    changed = [name for name in SWITCHES if getattr(args, name) != getattr(defaults, name)]
    redone = f"_{policy_label(args)}" if policy_label(args) else ""
    return "_fast" + "".join(f"_{name}_{getattr(args, name)}" for name in changed) + redone


def make_optimizer(model, name, lr, device, scaler):
    """resnext.py's Adam; or SGD or Muon without weight decay on one-dimensional weights (BatchNorm and biases).

    scaler: the GradScaler that takes the optimizer's steps.
    """
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=5e-4, fused=device.type == "cuda")
    groups = [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 5e-4},
        {"params": [weight for weight in model.parameters() if weight.ndim == 1], "weight_decay": 0.0},
    ]
    # Not fused with loss scaling: after a first step that overflows and is skipped, its momentum is uninitialised.
    how = {"lr": lr, "momentum": 0.9, "nesterov": True, "fused": None if scaler.is_enabled() else True}
    return Muon(model, groups, **how) if name == "muon" else torch.optim.SGD(groups, **how)


def one_cycle(step, steps):
    """The learning-rate factor of step `step` of `steps`: linearly up, then linearly to zero (Smith and Topin 2018)."""
    done = (step + 1) / (steps + 1)
    return min(done / WARMUP, (1 - done) / (1 - WARMUP))


def set_rate(optimizer, args, step, steps):
    """Set the learning rate for step `step` of `steps`: constant for adam, otherwise one cycle."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr if args.optimizer == "adam" else args.lr * one_cycle(step, steps)


def compiled(model, args, channels_last):
    """`model` under torch.compile, for batches of a single size."""
    # By default, Inductor drops channels last for a training graph that contains a grouped convolution.
    options = {"force_layout_optimization": channels_last, "triton.cudagraphs": args.cuda_graphs}
    if args.max_autotune:
        options |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    return torch.compile(model, dynamic=False, options=options)


def for_full_batches(model, data, args, precision, run, layout):
    """`model`, compiled for full batches if args.compile is set. An epoch's last batch, if smaller, runs uncompiled,
    since compiling for it would take longer. layout: memory_format and dtype of the images."""
    if not args.compile:
        return model
    fast_model = compiled(model, args, layout["memory_format"] == torch.channels_last)
    full = largest_batch(len(data.train_labels), args.batch_size, run.world.size)
    if policy_label(args):
        torch._dynamo.config.optimize_ddp = False  # Else DDP splits the graph, which recomputation needs in one piece.
        with precision.autocast():
            getattr(model, "module", model).prepare_to_compile()
    # A step without an update, so that the record separates compile time from training time.
    started, before = time.perf_counter(), [buffer.clone() for buffer in model.buffers()]
    with precision.autocast():
        output = fast_model(torch.zeros(full, 3, data.size, data.size, device=run.world.device).to(**layout))
    output.float().sum().backward()
    model.zero_grad(set_to_none=True)
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    run.facts["compile_seconds"] = time.perf_counter() - started
    return lambda images: (fast_model if len(images) == full else model)(images)


def load_laid_out(args, world, precision, run):
    """(the ImageData, the model on this process's device, {memory_format and dtype of its images})"""
    if policy_label(args):
        # A memory budget is planned for the chosen layout; until then nothing is recomputed.
        data, model = load_parts(args, world, run, CheckpointResNeXt, policy=args.policy or frozenset())
    else:
        data, model = load_parts(args, world, run, ResNeXt)
    chosen = choose_layout(model, data, args, world, precision, run)
    chosen.apply(model)
    return data, model, {"memory_format": chosen.memory_format, "dtype": precision.dtype or torch.float32}


def train(args, world, precision, run):
    device = world.device
    data, model, layout = load_laid_out(args, world, precision, run)
    plan = plan_memory(model, data, args, world, precision, run, **layout)
    parallel_model = world.wrap(model)
    fast_model = for_full_batches(parallel_model, data, args, precision, run, layout)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    optimizer = make_optimizer(model, args.optimizer, args.lr, device, precision.scaler)
    batches, loader = training_batches(args, world, data, run, **layout)
    scaler, metrics, steps = precision.scaler, Metrics(device), len(batches)
    phase, saved = PhaseTimer(device), SavedBytes(model)
    cost = StepCost(model, device, enabled=plan is not None and not args.compile)
    state = {"data": data, "model": model, "optimizer": optimizer, "scaler": scaler, "metrics": metrics}

    for epoch in run.epochs(phase, batches, **state):
        # ------------------------------------------------------------------------------------ the training step
        for images, labels in epoch.steps(loader):  # Waiting for a batch is the phase "data load".
            with phase("data copy"):
                images = images.to(device, non_blocking=True, **layout)
                labels = labels.to(device, non_blocking=True)
            with phase("zero grad"):
                optimizer.zero_grad(set_to_none=True)
            with phase("forward"), precision.autocast(), saved.first_time(), cost.measured_forward():
                output = fast_model(images)
                loss = criterion(output, labels)
            with phase("backward"), cost.measured_backward():
                # The weight corrects the average over processes when they share an epoch's last batch unevenly.
                scaler.scale(loss * epoch.weight).backward()
            with phase("optimizer"):
                set_rate(optimizer, args, epoch.number * steps + epoch.step, args.num_epoch * steps)
                scaler.step(optimizer)
                scaler.update()
            metrics.add(loss, output, labels, epoch.weight)  # On the device, without synchronizing.
            run.note_saved(saved.bytes)  # Here, so that a state saved within the epoch contains it.
            compare_with_plan(plan, saved, cost, run)
        # ---------------------------------------------------------------------------------------------------------
        epoch.end(evaluate(model, data, precision, world, args.batch_size, run.stop, **layout))
    run.finish(model)


if __name__ == "__main__":
    endings.run(main)
