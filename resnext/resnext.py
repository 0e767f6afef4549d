#!/usr/bin/env python3
"""Train ResNeXt on small images: the baseline that every technique is compared with.

By default it trains ResNeXt29_4x64d on CIFAR-10 with 2 workers, in single precision, with Adam at a constant learning
rate of 0.01 and weight decay 5e-4. --half_precision, --loader device and --keep_memory each add one technique.
resnext_checkpoint.py is the same loop with activation checkpointing; resnext_fast.py is the same loop with every
technique on.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import torch
from torch import nn

from experiment import Metrics, conduct, evaluate, get_args_parser, load_parts, training_batches
from harness import endings
from harness.memory import SavedBytes
from harness.timing import PhaseTimer
from models.resnext import ResNeXt


def main():
    args = get_args_parser(__doc__).parse_args()
    conduct(args, "resnext", "_keep_memory" * args.keep_memory, train)


def train(args, world, precision, run):
    device = world.device
    data, model = load_parts(args, world, run, ResNeXt)
    parallel_model = world.wrap(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=5e-4, fused=device.type == "cuda")
    batches, loader = training_batches(args, world, data, run)
    scaler, metrics = precision.scaler, Metrics(device)
    phase, saved = PhaseTimer(device), SavedBytes(model)
    state = {"data": data, "model": model, "optimizer": optimizer, "scaler": scaler, "metrics": metrics}

    for epoch in run.epochs(phase, batches, **state):
        # ------------------------------------------------------------------------------------ the training step
        for images, labels in epoch.steps(loader):  # Waiting for a batch is the phase "data load".
            with phase("data copy"):
                images = images.to(device, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
            with phase("zero grad"):
                optimizer.zero_grad(set_to_none=True)
            with phase("forward"), precision.autocast(), saved.first_time():
                output = parallel_model(images)
                loss = criterion(output, labels)
            with phase("backward"):
                # The weight corrects the average over processes when they share an epoch's last batch unevenly.
                scaler.scale(loss * epoch.weight).backward()
            with phase("optimizer"):
                scaler.step(optimizer)
                scaler.update()
            metrics.add(loss, output, labels, epoch.weight)  # On the device, without synchronizing.
            run.note_saved(saved.bytes)  # Here, so that a state saved within the epoch contains it.
        # ---------------------------------------------------------------------------------------------------------
        epoch.end(evaluate(model, data, precision, world, args.batch_size, run.stop))
    run.finish(model)


if __name__ == "__main__":
    endings.run(main)
