#!/usr/bin/env python3
"""Train ResNeXt on small pictures with everything on: the loop of resnext.py, and the techniques that pay together.

Pictures are augmented on the device, in the layout and type of the model; convolutions run channels last; on CUDA the
model is compiled and runs in bfloat16; SGD with Nesterov momentum follows one cycle to zero, with label smoothing and
no weight decay on BatchNorm and biases. Each can be switched off, down to the way of resnext.py:
--loader workers --half_precision False --channels_last False --compile False --optimizer adam --lr 0.01
--label_smoothing 0.

Measured by benchmarks/fast.py on a CPU (AMD EPYC, 2 cores; torch 2.13.0; resnext29_2x16d, batch 128, float32; n = 16
rounds, all arms in turn): 1.46 times the pictures/s of that way (1.10 to 2.34), of which the layout gives 1.41;
--half_precision gives 2.72, --compile 1.47. resnext29_4x64d, batch 8, n = 5: 1.05 (0.93 to 1.37), since there the step
takes 1.3 times what its matrix products alone would. Not yet measured: a GPU, and accuracy at full length.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from experiment import ImageRun, Metrics, evaluate, get_args_parser
from harness import command_line, determinism, distributed
from harness.command_line import boolean, fraction, share
from harness.loading import EpochBatches
from harness.precision import choose_precision
from harness.profiling import PhaseTimer, SavedBytes, nvtx_range
from harness.resume import stop_requests
from images import load_images, training_loader
from models.resnext import ResNeXt, parse_name

WARMUP = 0.2  # The share of training in which the learning rate rises.
SWITCHES = ("channels_last", "compile", "cuda_graphs", "optimizer", "label_smoothing", "ema")


def get_fast_args_parser():
    parser = get_args_parser(__doc__)
    on_cuda = torch.cuda.is_available()
    parser.set_defaults(loader="device", num_epoch=30, lr=0.1, half_precision="bfloat16" if on_cuda else None)
    switch = {"type": boolean, "nargs": "?", "const": True}
    add = parser.add_argument
    add("--channels_last", **switch, default=True, help="lay pictures and convolutions out as NHWC")
    add("--compile", **switch, default=on_cuda, help="torch.compile the model")
    add("--cuda_graphs", **switch, default=False, help="with --compile, launch its kernels as CUDA graphs")
    add("--optimizer", choices=("sgd", "adam"), default="sgd", help="sgd in one cycle, or resnext.py's constant Adam")
    add("--label_smoothing", type=share, default=0.1, help="weight of the uniform distribution in the target")
    add("--ema", type=fraction, metavar="DECAY",
        help="evaluate and keep an exponential moving average of the weights")  # fmt: skip
    return parser


def main():
    args = get_fast_args_parser().parse_args()
    determinism.apply(args)
    with distributed.world() as world:
        world.share(args.batch_size)
        precision = choose_precision(args.half_precision, world.device, args.true_fp32, world.say)
        run = ImageRun("resnext_fast", suffix(args), args, world, precision=precision.label)
        with run.lock():
            train(args, world, precision, run)


def suffix(args):
    """The end of the name of a run's files: "_fast", then whatever differs from this device's defaults."""
    parser = get_fast_args_parser()
    changed = [name for name in SWITCHES if getattr(args, name) != parser.get_default(name)]
    return "_fast" + "".join(f"_{name}_{getattr(args, name)}" for name in changed)


def layout_of(args, precision):
    """The memory format and dtype that pictures have in the model."""
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return {"memory_format": memory_format, "dtype": precision.dtype or torch.float32}


def make_optimizer(model, name, lr, device):
    """resnext.py's Adam, or SGD that leaves what has one dimension (BatchNorm and biases) undecayed."""
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=5e-4, fused=device.type == "cuda")
    groups = [
        {"params": [weight for weight in model.parameters() if weight.ndim > 1], "weight_decay": 5e-4},
        {"params": [weight for weight in model.parameters() if weight.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)


def one_cycle(step, steps):
    """The factor of the learning rate in step `step` of `steps`: linearly up, then to zero (Smith and Topin 2018)."""
    done = (step + 1) / (steps + 1)
    return min(done / WARMUP, (1 - done) / (1 - WARMUP))


def compiled(model, args):
    """`model` under torch.compile. Batches have two sizes, the last of an epoch being smaller: each is compiled for."""
    # Left alone, Inductor gives up channels last for a training graph that holds a grouped convolution.
    options = {"force_layout_optimization": args.channels_last, "triton.cudagraphs": args.cuda_graphs}
    return torch.compile(model, dynamic=False, options=options)


def train(args, world, precision, run):
    device = world.device
    if args.resume and run.finished:
        world.say(f"{run.path('.json')} is finished; nothing to resume")
        return
    with world.first_on_machine():
        data = load_images(args.dataset, args.data_dir)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.manual_seed(args.seed)
    layout = layout_of(args, precision)
    model = ResNeXt(*parse_name(args.model), num_classes=len(data.classes)).to(device)
    model.to(memory_format=layout["memory_format"])
    fast_model = compiled(world.wrap(model), args) if args.compile else world.wrap(model)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    optimizer = make_optimizer(model, args.optimizer, args.lr, device)
    scaler = precision.scaler
    batches = EpochBatches(len(data.train_labels), args.batch_size, args.seed, world.rank, world.size)
    loader = training_loader(args.loader, data, args.seed, batches, args.num_worker, device, world.say, **layout)
    steps = len(batches)
    metrics = Metrics(device)
    phase, saved = PhaseTimer(device), SavedBytes(model)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "metrics": metrics}
    if args.ema:
        state["average"] = average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
    first_epoch, first_step = run.resume(**state) if args.resume else (0, 0)
    run.facts["parameters"] = sum(weight.numel() for weight in model.parameters())

    with nvtx_range("training resnext"), stop_requests(enabled=world.size == 1) as stop:
        for epoch in range(first_epoch, args.num_epoch):
            batches.start(epoch, first_step)
            step = first_step - 1
            bar = run.progress_bar(epoch, batches.samples_from(first_step))
            with nvtx_range(f"epoch {epoch + 1}"):
                phase.start_epoch()
                # --------------------------------------------------------------- the training step
                for step, (images, labels) in phase.steps(loader, f"epoch {epoch + 1}", first_step, args.max_steps):
                    with phase("data copy"):
                        images = images.to(device, non_blocking=True, **layout)
                        labels = labels.to(device, non_blocking=True)
                    with phase("zero grad"):
                        optimizer.zero_grad(set_to_none=True)
                    with phase("forward"), precision.autocast(), saved.first_time():
                        output = fast_model(images)
                        loss = criterion(output, labels)
                    with phase("backward"):
                        scaler.scale(loss * batches.weight(step)).backward()
                    with phase("optimizer"):
                        if args.optimizer == "sgd":
                            for group in optimizer.param_groups:
                                group["lr"] = args.lr * one_cycle(epoch * steps + step, args.num_epoch * steps)
                        scaler.step(optimizer)
                        scaler.update()
                        if args.ema:
                            average.update_parameters(model)
                    metrics.add(loss, output, labels, batches.weight(step))
                    bar.update(len(labels) * world.size)
                    if stop:
                        break
                # ---------------------------------------------------------------------------------
                timing = phase.end_epoch()
            bar.close()
            if saved.bytes is not None:
                run.facts.setdefault("saved_activation_bytes", saved.bytes)
            if phase.steps_done == args.max_steps:
                run.finish_profiling(timing)
                return
            judged = average.module if args.ema else model
            test_acc = evaluate(judged, data, precision, world, args.batch_size, stop)
            if stop:
                if metrics.finite():
                    run.save(epoch, step + 1, **state)
                stop.leave()
            run.add_epoch(epoch, *metrics.result(world), test_acc, timing, batches.samples_from(first_step))
            metrics.reset()
            first_step = 0
            run.save(epoch + 1, 0, **state)
            world.say(run.line())
    run.finish(average.module if args.ema else model)


if __name__ == "__main__":
    command_line.run(main)
