"""Activation checkpointing under torch.compile: the steps of a Tape (harness.recompute), chosen by the same names.

Compiled code has no saved tensors to put a Tape's hooks on; but its partitioner, which says what forward keeps, obeys
torch.utils.checkpoint's selective contexts. They are asked operator by operator, so the operator with which each step
ends is looked up first, by running the steps once without data.

What a redone BatchNorm takes is more than on a Tape: the mean and the variance are computed a second time.
"""

import functools
import logging
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Untaped:
    """What takes a Tape's place where nothing is redone by hand: it only calls."""

    def run(self, name, function, *inputs):
        return function(*inputs)

    def batch_norm(self, layer, x):
        return layer(x)


def selective_contexts(run_steps, batch, redo):
    """The context_fn with which `checkpointed` redoes the steps that `redo(name)` chooses.

    run_steps(tape, batch) is a model's training forward in steps. It is called once, here, so its model and `batch`
    should be copies on the device "meta", which computes nothing. Call it under the run's autocast.
    """
    # It warns of operators in place, which compiled code has none of: AOTAutograd has replaced them.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    with torch.no_grad(), _Ends() as ends:  # Where gradients are wanted, operators are called that will not be there.
        run_steps(ends, batch)
    return functools.partial(_contexts, {end: redo(name) for end, name in ends.steps.items()})


def checkpointed(run_steps, batch, contexts):
    """run_steps(Untaped(), batch), to be compiled: backward redoes what `contexts`, of selective_contexts, says."""
    # What is redone is not random, and compiled code restores no random state anyway.
    forward = functools.partial(run_steps, Untaped())
    return checkpoint(forward, batch, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class _Ends(Untaped, TorchDispatchMode):
    """steps: {(operator, how many calls of it came before): the name of the step that ends with it}"""

    def __init__(self):
        super().__init__()
        self.steps, self._calls, self._last = {}, Counter(), None

    def run(self, name, function, *inputs):
        output = function(*inputs)
        self.steps[self._last] = name
        return output

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self._last = (str(operator), self._calls[str(operator)])
        self._calls[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


def _contexts(is_redone):
    calls = Counter()

    def policy(context, operator, *args, **kwargs):
        end = (str(operator), calls[str(operator)])
        calls[str(operator)] += 1
        if end not in is_redone:  # Within a step, or after the last: whatever is least.
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_RECOMPUTE if is_redone[end] else CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)
