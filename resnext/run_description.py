"""What a run of the ResNeXt scripts prints about itself: its settings at the start, the effect of its techniques at the
end."""

import datetime

import torch

from harness.epoch_times import typical_milliseconds
from harness.loading import largest_batch
from harness.machine import hardware_name
from harness.memory import in_mib
from harness.planning import describe
from harness.precision import HALF, explain_half_precision
from models.grouped_convolution import set_form
from models.resnext import parse_name
from models.resnext_checkpoint import CheckpointResNeXt


def describe_run(run):
    """The two lines that an ImageRun prints first."""
    args, facts, device = run.args, run.facts, run.world.device
    layout = "channels last" if facts.get("layout", {}).get("channels_last") else "contiguous"
    form = facts.get("layout", {}).get("form", "groups")  # One of models.grouped_convolution.FORMS.
    compiled = "compiled" if getattr(args, "compile", False) else "not compiled"
    processes = f", {run.world.size} processes" if run.world.size > 1 else ""
    half_precision = explain_half_precision(facts["precision"], device)
    return (
        f"{args.model}, {facts['parameters']:,} parameters, {facts['precision']}, {layout} (convolutions: {form}), "
        f"{compiled}, on {device} ({hardware_name(device)}{processes}); {len(run.batches)} steps of "
        f"{args.batch_size} images per epoch",
        "; ".join([_loading(run), half_precision, _recomputation(run), *_fast(run)]),
    )


def _loading(run):
    if run.facts["loading"] == "device":
        return "images augmented on the device"
    number = run.args.num_worker
    return f"images loaded by {number} worker{'s' * (number != 1)}" if number else "images loaded without workers"


def _recomputation(run):
    args = run.args
    if getattr(args, "memory_budget", None):
        what = "activations held" if args.budget_of == "held" else "peak"
        return f"recomputation on ({what} at most {args.memory_budget:g} of that without recomputation)"
    if getattr(args, "policy", None):
        return f"recomputation on (policy {args.policy})"
    if run.experiment == "resnext":
        return "recomputation off (resnext_checkpoint.py)"
    return "recomputation off (--policy, --memory_budget)"


def _fast(run):
    """The settings that only resnext_fast.py can switch."""
    args, layout = run.args, run.facts.get("layout")
    if layout is None:
        return [*_freed_memory(run), "compiling, choice of layout off (resnext_fast.py)"]
    why_layout = "as requested"
    if "milliseconds_a_picture" in layout:
        why_layout = "the fastest here" + " before compiling" * args.compile
    elif None in (args.channels_last, args.grouped_convolution):
        why_layout = "not measured (--deterministic)"
    why = "" if args.compile else f" ({'not on CUDA' if run.world.device.type != 'cuda' else '--compile'})"
    return [
        f"layout {why_layout}",
        f"compiling {'on' if args.compile else 'off'}{why}",
        f"{args.optimizer} {'at a constant rate' if args.optimizer == 'adam' else 'in one cycle'}, "
        f"label smoothing {args.label_smoothing:g}",
        *_freed_memory(run),
    ]


def _freed_memory(run):
    if run.world.device.type != "cpu":
        return []
    return [f"freed memory {'kept' if run.args.keep_memory else 'given back (--keep_memory)'}"]


def plan_of(run, policy=frozenset(), half_precision=False):
    """The Plan of a step of an ImageRun under `policy`, as for CheckpointResNeXt; in single precision, or in the run's
    own precision with half_precision. Nothing is compiled for it, and no random state changes."""
    args, data, device = run.args, run.state["data"], run.world.device
    dtype = HALF.get(run.facts["precision"]) if half_precision else None
    with torch.random.fork_rng(devices=[]):
        model = CheckpointResNeXt(*parse_name(args.model), num_classes=len(data.classes), policy=policy).to(device)
    set_form(model, run.facts.get("layout", {}).get("form", "groups"))
    pictures = largest_batch(len(data.train_labels), args.batch_size, run.world.size)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        timeline = model.rehearse(pictures, data.size, timed=False)
    return describe(timeline, frozenset(filter(model.redo, timeline.steps)))


def describe_effect(run):
    """What forward kept for backward in an ImageRun's first step, compared with the same step without the techniques
    and with the plan, as text; None if it was not measured."""
    facts, kept = run.facts, run.facts.get("saved_activation_bytes")
    if kept is None:
        return None
    text = f"kept from forward to backward: {in_mib(kept)} MiB"
    changes = ["compiling"] * bool(getattr(run.args, "compile", False))
    changes += ["recomputation"] * bool(facts.get("policy")) + ["half precision"] * (facts["precision"] in HALF)
    if not changes:
        return text
    plain, plan = plan_of(run), facts.get("plan")
    if plan:
        text += f" (planned {in_mib(plan['held_bytes'])})"
    text += f", without {' and '.join(changes)} {in_mib(plain.plain_bytes)} ({kept / plain.plain_bytes:.2f} x)"
    peak = facts.get("measured", {}).get("peak_bytes")  # None for compiled code, which hides it.
    if plan and peak is not None:
        before = plan["plain_peak_bytes"]
        # On CUDA the peak includes the gradients of the weights and cuDNN's workspace, which no plan accounts for.
        share = "" if run.world.device.type == "cuda" else f" ({peak / before:.2f} x)"
        text += (
            f"; peak {in_mib(peak)} (planned {in_mib(plan['peak_bytes'])}), without recomputation {in_mib(before)}"
            f"{share}, by recomputing {len(plan['redo'])} operations"
        )
    return text


def describe_prospects(run, timing):
    """Lines that predict the cost of an ImageRun from the steps of --dry_run. timing: of those steps, from a
    PhaseTimer. The time is that of the median step, scaled to the number of images; evaluation counts as forward
    passes."""
    args, data, world = run.args, run.state["data"], run.world
    pictures, tests = len(data.train_labels), len(data.test_labels)
    batch = min(args.batch_size, pictures)
    step, forward = (typical_milliseconds(timing["phases"][name]) / 1e3 for name in ("step", "forward"))
    seconds = args.num_epoch * (step * pictures + forward * tests) / batch + run.seconds["start_up_seconds"]
    weights = sum(weight.nbytes for weight in run.state["model"].parameters())
    moments = sum(
        value.nbytes
        for values in run.state["optimizer"].state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    asked = getattr(args, "policy", None)
    policy = frozenset(run.facts["plan"]["redo"]) if run.facts.get("plan") else asked
    plan = plan_of(run, frozenset() if policy in (None, "nested") else policy, half_precision=True)
    classifier = 6 * batch // world.size * run.state["model"].linear.weight.numel()  # What follows the plan's steps.
    flops = plan.plain_flops + plan.extra_flops + classifier
    memory = (
        f"predicted: {in_mib(plan.held_bytes)} MiB kept from forward to backward, {in_mib(plan.peak_bytes)} at the peak"
    )
    least = "about"
    if asked == "nested":  # No plan covers this policy: these are the operations of a step without recomputation.
        least, memory = "at least", "memory is not predicted for the policy nested"
    peak = timing["peak_memory"]
    allocated = f"; the allocator's peak was {in_mib(peak['allocated_bytes'])}" if peak else ""
    steps = -(-pictures // args.batch_size)
    return (
        f"{run.facts['parameters']:,} parameters; {least} {flops / 1e9:.4g} GFLOP per step, forward and backward"
        + f", in each of {world.size} processes" * (world.size > 1),
        f"{memory}; {in_mib(2 * weights + moments)} for weights, gradients and the optimizer{allocated}",
        f"{steps} steps per epoch, {step:.4g} s each (the median of {timing['phases']['step']['count'] or 1}); "
        f"{args.num_epoch} epochs with evaluation would take about {seconds:.0f} s "
        f"({datetime.timedelta(seconds=round(seconds))})",
    )
