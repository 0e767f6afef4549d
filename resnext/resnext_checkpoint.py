#!/usr/bin/env python3
"""Train ResNeXt on small images with activation checkpointing: the loop of resnext.py, with less memory and some
recomputation.

--policy chooses what backward recomputes because forward does not keep it (models/resnext_checkpoint.py explains the
policies). --memory_budget plans this so that the peak is at most the given share of the peak without recomputation.
Weights, losses and BatchNorm statistics are those of resnext.py, bit for bit on a CPU.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import torch
from torch import nn

from experiment import Metrics, conduct, evaluate, get_args_parser, load_parts, training_batches
from harness import endings
from harness.memory import SavedBytes
from harness.planning import StepCost
from harness.timing import PhaseTimer
from memory_plan import add_budget_arguments, compare_with_plan, plan_memory, policy_label
from models.resnext_checkpoint import DEFAULT_POLICY, CheckpointResNeXt


def main():
    parser = get_args_parser(__doc__)
    add_budget_arguments(parser, DEFAULT_POLICY)
    args = parser.parse_args()
    policy = policy_label(args)
    suffix = "_checkpoint" if policy == DEFAULT_POLICY else f"_checkpoint_{policy}"
    conduct(args, "resnext_checkpoint", suffix + "_keep_memory" * args.keep_memory, train, policy=policy)


def train(args, world, precision, run):
    device = world.device
    data, model = load_parts(args, world, run, CheckpointResNeXt, policy=args.policy)
    plan = plan_memory(model, data, args, world, precision, run)
    parallel_model = world.wrap(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=5e-4, fused=device.type == "cuda")
    batches, loader = training_batches(args, world, data, run)
    scaler, metrics = precision.scaler, Metrics(device)
    phase, saved = PhaseTimer(device), SavedBytes(model)
    cost = StepCost(model, device, enabled=plan is not None)
    state = {"data": data, "model": model, "optimizer": optimizer, "scaler": scaler, "metrics": metrics}

    for epoch in run.epochs(phase, batches, **state):
        # ------------------------------------------------------------------------------------ the training step
        for images, labels in epoch.steps(loader):  # Waiting for a batch is the phase "data load".
            with phase("data copy"):
                images = images.to(device, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
            with phase("zero grad"):
                optimizer.zero_grad(set_to_none=True)
            with phase("forward"), precision.autocast(), saved.first_time(), cost.measured_forward():
                output = parallel_model(images)
                loss = criterion(output, labels)
            with phase("backward"), cost.measured_backward():
                # The weight corrects the average over processes when they share an epoch's last batch unevenly.
                scaler.scale(loss * epoch.weight).backward()
            with phase("optimizer"):
                scaler.step(optimizer)
                scaler.update()
            metrics.add(loss, output, labels, epoch.weight)  # On the device, without synchronizing.
            run.note_saved(saved.bytes)  # Here, so that a state saved within the epoch contains it.
            compare_with_plan(plan, saved, cost, run)
        # ---------------------------------------------------------------------------------------------------------
        epoch.end(evaluate(model, data, precision, world, args.batch_size, run.stop))
    run.finish(model)


if __name__ == "__main__":
    endings.run(main)
