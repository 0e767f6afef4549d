"""The three training loops of ResNeXt are one: they differ in the lines that are their technique, and in no other."""

import difflib

import pytest

from reporting import loops

BASELINE = "resnext.py"
LONGEST = 45  # Lines that are read at one look.
# What the loop of each script has more than the baseline's, and what it has in place of the baseline's own.
TECHNIQUE = {
    "resnext_checkpoint.py": (
        [
            "data, model = load_parts(args, world, run, CheckpointResNeXt, policy=args.policy)",
            "plan = plan_memory(model, data, args, world, precision, run)",
            "cost = StepCost(model, device, enabled=plan is not None)",
            'with phase("forward"), precision.autocast(), saved.first_time(), cost.measured_forward():',
            'with phase("backward"), cost.measured_backward():',
            "compare_with_plan(plan, saved, cost, run)",
        ],
        [
            "data, model = load_parts(args, world, run, ResNeXt)",
            'with phase("forward"), precision.autocast(), saved.first_time():',
            'with phase("backward"):',
        ],
    ),
    "resnext_fast.py": (
        [
            "data, model, layout = load_laid_out(args, world, precision, run)",
            "plan = plan_memory(model, data, args, world, precision, run, **layout)",
            "fast_model = for_full_batches(parallel_model, data, args, precision, run, layout)",
            "criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)",
            "optimizer = make_optimizer(model, args.optimizer, args.lr, device, precision.scaler)",
            "batches, loader = training_batches(args, world, data, run, **layout)",
            "scaler, metrics, steps = precision.scaler, Metrics(device), len(batches)",
            "cost = StepCost(model, device, enabled=plan is not None and not args.compile)",
            "images = images.to(device, non_blocking=True, **layout)",
            'with phase("forward"), precision.autocast(), saved.first_time(), cost.measured_forward():',
            "output = fast_model(images)",
            'with phase("backward"), cost.measured_backward():',
            "set_rate(optimizer, args, epoch.number * steps + epoch.step, args.num_epoch * steps)",
            "compare_with_plan(plan, saved, cost, run)",
            "epoch.end(evaluate(model, data, precision, world, args.batch_size, run.stop, **layout))",
        ],
        [
            "data, model = load_parts(args, world, run, ResNeXt)",
            "criterion = nn.CrossEntropyLoss()",
            'optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=5e-4, fused=device.type == "cuda")',
            "batches, loader = training_batches(args, world, data, run)",
            "scaler, metrics = precision.scaler, Metrics(device)",
            "images = images.to(device, non_blocking=True)",
            'with phase("forward"), precision.autocast(), saved.first_time():',
            "output = parallel_model(images)",
            'with phase("backward"):',
            "epoch.end(evaluate(model, data, precision, world, args.batch_size, run.stop))",
        ],
    ),
}


def lines_of(script):
    return [line.strip() for line in loops.loop(script)]


@pytest.mark.parametrize("script", [BASELINE, *TECHNIQUE])
def test_a_loop_is_read_at_one_look_and_in_order(script):
    lines = lines_of(script)
    assert len(lines) <= LONGEST
    phases = [line.split('"')[1] for line in lines if line.startswith("with phase(")]
    assert phases == ["data copy", "zero grad", "forward", "backward", "optimizer"]


@pytest.mark.parametrize("script", TECHNIQUE)
def test_loops_differ_in_their_technique_alone(script):
    marked = [line for line in difflib.ndiff(lines_of(BASELINE), lines_of(script)) if line[0] in "+-"]
    more, less = TECHNIQUE[script]
    assert [line[2:] for line in marked if line[0] == "+"] == more
    assert [line[2:] for line in marked if line[0] == "-"] == less


def test_the_loop_of_the_scorer_is_read_at_one_look_too():
    assert len(loops.loop("../SimCLS/main.py")) <= LONGEST
