"""Activation checkpointing under torch.compile: the steps of a Tape (harness.recompute), chosen by the same names.

A Tape's saved-tensor hooks do not work in compiled code; but the partitioner, which decides what forward keeps, obeys
torch.utils.checkpoint's selective contexts. These are queried operator by operator, so the last operator of each step
is looked up first, by running the steps once without data.

A recomputed BatchNorm costs more than on a Tape: its mean and variance are computed a second time.
"""

import functools
import logging
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


class Untaped:
    """A stand-in for a Tape in compiled code: it only calls."""

    def run(self, name, function, *inputs):
        return function(*inputs)

    def batch_norm(self, layer, x):
        return layer(x)


def selective_contexts(run_steps, batch, redo):
    """The context_fn with which `checkpointed` recomputes the steps for which `redo(name)` is true.

    run_steps(tape, batch) is a model's training forward in steps. It is called once, here, so its model and `batch`
    should be copies on the device "meta", which computes nothing. Call it under the run's autocast.
    """
    # It warns of in-place operators, which compiled code does not have: AOTAutograd has replaced them.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    with torch.no_grad(), _Ends() as ends:  # With gradients, other operators would be called than in compiled code.
        run_steps(ends, batch)
    return functools.partial(_contexts, {end: redo(name) for end, name in ends.steps.items()})


def checkpointed(run_steps, batch, contexts):
    """run_steps(Untaped(), batch), to be compiled: backward recomputes what `contexts`, from selective_contexts,
    says."""
    # Recomputation involves no randomness, and compiled code restores no random state anyway.
    forward = functools.partial(run_steps, Untaped())
    return checkpoint(forward, batch, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class _Ends(Untaped, TorchDispatchMode):
    """steps: {(operator, number of earlier calls of it): the name of the step that ends with it}"""

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
        if end not in is_redone:  # Within a step, or after the last one: whatever is cheapest.
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_RECOMPUTE if is_redone[end] else CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)
