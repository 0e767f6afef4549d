"""For main.py --memory_budget: which parts of an encoder's layers are recomputed in backward to save memory.

A layer has two parts, attention and feed-forward. Either all activations of a part are kept, or only its input, and the
part is run again in backward (torch.utils.checkpoint). harness.planning chooses the parts by their bytes and time.
"""

import contextlib
import functools
import time

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from harness.devices import synchronize
from harness.endings import UserError
from harness.memory import LiveBytes, SavedBytes
from harness.planning import plan_recomputation
from harness.rehearsal import Event, Group, Step, Timeline

KINDS = ("attention", "feed_forward")
TRIES = 4  # Attempts at a plan whose measured peak, not only its planned one, is within the budget.


def parts_of(encoder):
    """{layer number: {kind: (module, name of the method that runs the part)}} for the BERT family and T5; {} for other
    encoders. Frozen layers keep nothing for backward, and are left out.

    encoder: a transformers model.
    """
    found = []
    for module in encoder.modules():
        if hasattr(module, "attention") and hasattr(module, "feed_forward_chunk"):
            found.append({"attention": (module.attention, "forward"), "feed_forward": (module, "feed_forward_chunk")})
        elif isinstance(getattr(module, "layer", None), nn.ModuleList) and hasattr(module.layer[-1], "DenseReluDense"):
            found.append({kind: (module.layer[at], "forward") for kind, at in zip(KINDS, (0, -1), strict=True)})
    weights = [[weight for module, _ in parts.values() for weight in module.parameters()] for parts in found]
    learns = [any(weight.requires_grad for weight in own) for own in weights]
    return {number: parts for number, parts in enumerate(found) if learns[number]}


def redo_parts(layers, redo):
    """Let backward recompute exactly the parts in `redo`, such as "3.attention". layers: as from `parts_of`."""
    for number, parts in layers.items():
        for kind, (module, method) in parts.items():
            module.__dict__.pop(method, None)  # An earlier call may have hidden the class's method.
            if f"{number}.{kind}" in redo:
                setattr(module, method, _redone(getattr(module, method)))


def _redone(method):
    @functools.wraps(method)  # transformers inspects the signature.
    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        return checkpoint(method, *args, use_reentrant=False, **kwargs)

    return run


def plan_memory(scorer, samples, args, world, precision, run):
    """`scorer`, with recomputation for --memory_budget if given, planned for the longest documents.

    samples: data_utils.SampleSet. run: gets the plan in its record, and `kept_share`: the bytes kept for backward, for
    two documents of median length, as a share of those in single precision without recomputation.
    """
    if not (args.memory_budget or args.use_checkpoint or precision.dtype):
        return scorer
    by_length = np.argsort(samples.document_lengths)
    few = min(2, args.batch_size, len(samples))
    usual = samples.batch(by_length[(len(samples) - few) // 2 :][:few]).to(world.device)
    plain = _held(scorer, usual, contextlib.nullcontext())
    if args.use_checkpoint:
        scorer.recompute_activations()
    if args.memory_budget:
        _plan_budget(scorer, samples.batch(by_length[-few:]).to(world.device), args, world, precision, run)
    run.kept_share = _held(scorer, usual, precision.autocast()) / plain
    return scorer


def _held(scorer, batch, autocast):
    """The bytes that the encoder's forward keeps for backward."""
    with SavedBytes(scorer) as saved, autocast:
        scorer.encode_texts(batch.texts, batch.lengths)
    return saved.bytes


def _plan_budget(scorer, batch, args, world, precision, run):
    texts, lengths = max(zip(batch.texts, batch.lengths, strict=True), key=lambda call: call[0].numel())
    plan, share = plan_layers(scorer, texts, lengths, args.memory_budget, precision, world)
    redone = [f"{sum(name.endswith(kind) for name in plan.redo)} x {kind.replace('_', '-')}" for kind in KINDS]
    planned = plan.peak_bytes / plan.plain_peak_bytes
    world.say(f"plan: backward recomputes {' and '.join(redone)}, for a peak of {share:.3f} (planned {planned:.3f})")
    run.facts["plan"] = {"redo": sorted(plan.redo), "peak_share": share, "planned_peak_share": planned}


def plan_layers(scorer, texts, lengths, budget, precision, world):
    """Let backward recompute the parts of `scorer`'s layers that are cheapest to recompute, so that the peak of
    activations and their gradients is at most `budget` times that without recomputation.

    texts, lengths: of one encoder call (Scorer.encode_texts). Calls with fewer or shorter texts hold proportionally
    less. All processes of a job make the same plan. Returns (the Plan, its measured peak as a share of that without).

    UserError for other kinds of encoders, and if the budget cannot be met.
    """
    layers = parts_of(scorer.encoder)
    if not layers:
        kind = scorer.encoder.config.model_type
        raise UserError(f"--memory_budget supports encoders of the BERT family and T5, not {kind}; leave it out")
    measure = functools.partial(_measure, scorer, layers, texts, lengths, precision)
    held, peak = measure(())
    sizes = {}
    for names in _alike(layers):
        sizes |= dict.fromkeys(names, (held - measure(names)[0]) // len(names))
    seconds = _seconds(scorer, layers, texts, lengths, precision, world)
    timeline = _timeline(layers, sizes, seconds, held, peak)
    limit = budget
    for _ in range(TRIES):
        plan = plan_recomputation(timeline, peak=limit)
        share = measure(plan.redo)[1] / peak
        if share <= budget:
            return plan, share
        limit -= share - budget
    raise UserError(f"a memory budget of {budget:g} cannot be met; the nearest plan has a peak of {share:.3f}")


def _alike(layers):
    """[[names of parts that hold and take as much as each other], ...]. The last feed-forward part runs for the first
    token alone."""
    last = max(layers)
    attention, feed_forward = ([f"{number}.{kind}" for number in layers] for kind in KINDS)
    feed_forward.remove(f"{last}.feed_forward")
    return [names for names in (attention, feed_forward, [f"{last}.feed_forward"]) if names]


def _measure(scorer, layers, texts, lengths, precision, redo):
    """(bytes held after forward, peak bytes) of the forward and backward of one encoder call."""
    redo_parts(layers, redo)
    live = LiveBytes(scorer)
    with live, SavedBytes(scorer) as saved, precision.autocast():
        states = scorer.encode_texts([texts], [lengths])
    with live:
        states.sum().backward()
    scorer.zero_grad(set_to_none=True)
    return saved.bytes, live.peak


def _seconds(scorer, layers, texts, lengths, precision, world):
    """{part: seconds of its forward}, the minimum over parts that are alike, averaged over the processes."""
    taken = {}

    def timed(name, method):
        @functools.wraps(method)
        def run(*args, **kwargs):
            synchronize(texts.device)
            start = time.perf_counter()
            output = method(*args, **kwargs)
            synchronize(texts.device)
            taken[name] = time.perf_counter() - start
            return output

        return run

    redo_parts(layers, ())
    for number, parts in layers.items():
        for kind, (module, method) in parts.items():
            setattr(module, method, timed(f"{number}.{kind}", getattr(module, method)))
    with torch.no_grad(), precision.autocast():
        scorer.encode_texts([texts], [lengths])
    redo_parts(layers, ())
    alike = _alike(layers)
    least = [min(map(taken.get, names)) for names in alike]
    means = world.sum(torch.tensor(least, dtype=torch.float32, device=texts.device)) / world.size
    return {name: seconds for names, seconds in zip(alike, means.tolist(), strict=True) for name in names}


def _timeline(layers, sizes, seconds, held, peak):
    """The Timeline of a call. Backward needs the parts one after the other, from the last layer to the first."""
    fixed, other = held - sum(sizes.values()), peak - sum(sizes.values())
    groups, entry = [], None
    for number in layers:
        # Parts are recomputed from inputs that are kept anyway, so no step depends on another.
        names = [f"{number}.{kind}" for kind in KINDS]
        steps = [Step(name, (), sizes[name], sizes[name], 0, 0, seconds[name]) for name in names]
        forward = [Event("made", step.name, other) for step in steps]
        backward = [
            Event(kind, None if kind == "live" else step.name, other)
            for step in reversed(steps)
            for kind in ("need", "live", "done")
        ]
        groups.append(Group(entry, steps, forward, backward))
        entry = steps[-1].name
    return Timeline(groups, fixed)
