#!/usr/bin/env python3
"""Train ResNeXt on small pictures: the baseline that every technique is measured against.

With no argument: ResNeXt29_4x64d on CIFAR-10, 2 workers, single precision, Adam at a constant rate of 0.01 with weight
decay 5e-4. Each argument adds one technique; resnext_checkpoint.py is the same loop with activation checkpointing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from experiment import ImageRun, Metrics, evaluate, get_args_parser, training_batches
from harness import determinism, distributed, endings
from harness.memory import SavedBytes
from harness.precision import choose_precision
from harness.resume import stop_requests
from harness.timing import PhaseTimer, nvtx_range
from images import load_images
from models.resnext import ResNeXt, parse_name


def main():
    args = get_args_parser(__doc__).parse_args()
    determinism.apply(args)
    with distributed.world() as world:
        world.check_divisible(args.batch_size)
        precision = choose_precision(args.half_precision, world.device, args.true_fp32, world.say)
        run = ImageRun("resnext", "", args, world, precision=precision.label)
        with run.lock():
            if not run.is_done():
                train(args, world, precision, run)


def load_parts(args, world, run):
    """(the ImageData, the model on this process's device)"""
    with world.first_on_machine():
        data = load_images(args.dataset, args.data_dir)
    torch.manual_seed(args.seed)
    model = ResNeXt(*parse_name(args.model), num_classes=len(data.classes))
    run.facts["parameters"] = sum(weight.numel() for weight in model.parameters())
    return data, model.to(world.device)


def train(args, world, precision, run):
    device = world.device
    data, model = load_parts(args, world, run)
    parallel_model = world.wrap(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=5e-4, fused=device.type == "cuda")
    batches, loader = training_batches(args, world, data, run)
    scaler, metrics = precision.scaler, Metrics(device)
    phase, saved = PhaseTimer(device), SavedBytes(model)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler, "metrics": metrics}
    first_epoch, first_step = run.resume(**state) if args.resume else (0, 0)

    with nvtx_range("training resnext"), stop_requests(enabled=world.size == 1) as stop:
        for epoch in range(first_epoch, args.num_epoch):
            batches.start(epoch, first_step)
            step, bar = first_step - 1, run.progress_bar(epoch, batches.samples_from(first_step))
            with nvtx_range(f"epoch {epoch + 1}"):
                phase.start_epoch()
                # --------------------------------------------------------------- the training step
                for step, (images, labels) in phase.steps(loader, f"epoch {epoch + 1}", first_step, args.max_steps):
                    with phase("data copy"):
                        images = images.to(device, non_blocking=True)
                        labels = labels.to(device, non_blocking=True)
                    with phase("zero grad"):
                        optimizer.zero_grad(set_to_none=True)
                    with phase("forward"), precision.autocast(), saved.first_time():
                        output = parallel_model(images)
                        loss = criterion(output, labels)
                    with phase("backward"):
                        scaler.scale(loss * batches.weight(step)).backward()
                    with phase("optimizer"):
                        scaler.step(optimizer)
                        scaler.update()
                    metrics.add(loss, output, labels, batches.weight(step))
                    bar.update(len(labels) * world.size)
                    if stop:
                        break
                # ---------------------------------------------------------------------------------
                timing = phase.end_epoch()
            bar.close()
            run.note_saved(saved.bytes)
            if phase.steps_done == args.max_steps:
                run.finish_profiling(timing)
                return
            test_acc = evaluate(model, data, precision, world, args.batch_size, stop)
            if stop:
                if metrics.finite():
                    run.save(epoch, step + 1, **state)
                stop.leave()
            run.add_epoch(epoch, *metrics.result(world), test_acc, timing, batches.samples_from(first_step))
            metrics.reset()
            first_step = 0
            run.save(epoch + 1, 0, **state)
            world.say(run.line())
    run.finish(model)


if __name__ == "__main__":
    endings.run(main)
