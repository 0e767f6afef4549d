"""ResNeXt with activation checkpointing: the model of resnext.py, with forward split into named steps.

A policy says which steps backward recomputes because forward does not keep their outputs (steps of a block: conv1,
relu1, conv2, relu2, conv3, shortcut, out):

chain     relu1, relu2 and out: each BatchNorm, ReLU and sum is recomputed from the convolutions before it; no
          convolution is. (A block's input is also recomputed, from the sums before it.)
block     all but out: a block keeps only its input (the usual practice; Chen et al. 2016).
nested    the original study's way, with torch.utils.checkpoint: stages, and blocks within them. Kept for comparison.

A collection of step names ("layer1.0.conv1", ...) is also a policy, such as the `redo` of a harness.planning.Plan.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from harness.compiled_recompute import checkpointed, selective_contexts
from harness.recompute import Tape
from harness.rehearsal import rehearse
from models.resnext import Block, ResNeXt

POLICIES = {"chain": ("relu1", "relu2", "out"), "block": ("conv1", "relu1", "conv2", "relu2", "conv3", "shortcut")}
DEFAULT_POLICY = "chain"


class CheckpointBlock(Block):
    """A Block whose training forward runs as named steps on `tape`."""

    def forward(self, x, tape=None, name=""):
        if tape is None:
            return super().forward(x)
        norm = tape.batch_norm  # Its result may be changed in place: backward does not need it.
        out = tape.run(f"{name}.conv1", self.conv1, x)
        out = tape.run(f"{name}.relu1", lambda out: norm(self.bn1, out).relu_(), out)
        out = tape.run(f"{name}.conv2", self.conv2, out)
        out = tape.run(f"{name}.relu2", lambda out: norm(self.bn2, out).relu_(), out)
        out = tape.run(f"{name}.conv3", self.conv3, out)
        if not len(self.shortcut):
            return tape.run(f"{name}.out", lambda out, x: norm(self.bn3, out).add_(x).relu_(), out, x)
        convolution, bn = self.shortcut
        x = tape.run(f"{name}.shortcut", convolution, x)
        return tape.run(f"{name}.out", lambda out, x: norm(self.bn3, out).add_(norm(bn, x)).relu_(), out, x)


class CheckpointResNeXt(ResNeXt):
    """ResNeXt with the same parameters and results; in training, backward recomputes what `policy` names."""

    block = CheckpointBlock

    def __init__(self, cardinality, bottleneck_width, num_classes=10, policy=DEFAULT_POLICY):
        super().__init__(cardinality, bottleneck_width, num_classes)
        self.policy = policy

    def redo(self, name):
        """Whether the policy recomputes the step `name`."""
        if self.policy in POLICIES:
            return name.rpartition(".")[2] in POLICIES[self.policy]
        return name in self.policy

    def forward(self, x):
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        if self.policy == "nested":
            return self._nested_forward(x)
        if torch.compiler.is_compiling():
            return checkpointed(self.run_steps, x, self.contexts)
        with Tape(self.redo) as tape:
            return self.run_steps(tape, x)

    def prepare_to_compile(self):
        """Call this before torch.compile, under the run's autocast, once the policy is set."""
        pictures = torch.empty(2, 3, 32, 32, device="meta")  # The steps do not depend on batch or image size.
        self.contexts = selective_contexts(copy.deepcopy(self).to("meta").run_steps, pictures, self.redo)

    def run_steps(self, tape, x):
        """The training forward as named steps on `tape`."""
        out = tape.run("stem.conv1", self.conv1, x)
        out = tape.run("stem.relu1", lambda out: tape.batch_norm(self.bn1, out).relu_(), out)
        for stage in ("layer1", "layer2", "layer3"):
            for index, block in enumerate(getattr(self, stage)):
                out = block(out, tape, f"{stage}.{index}")
        out = tape.run("head.pool", lambda out: F.avg_pool2d(out, out.shape[2:]).flatten(1), out)
        return self.linear(out)

    def rehearse(self, batch_size, side=32, timed=True, **layout):
        """The harness.rehearsal.Timeline of a training step, for harness.planning. Call it under the run's autocast.

        side: height and width of an image in pixels. layout: memory_format and dtype of the images. timed: whether to
        measure seconds as well.
        """
        # On a copy, since forward updates BatchNorm's statistics. The content of the images does not matter.
        model, device = copy.deepcopy(self).train(), self.linear.weight.device

        def pictures(count):
            return torch.zeros(count, 3, side, side, device=device).to(**layout)

        return rehearse(model, model.run_steps, pictures, batch_size, timed)

    def _nested_forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            out = self._checkpoint(stage, self._nested_stage, stage, out)
        out = F.avg_pool2d(out, out.shape[2:])
        return self.linear(out.flatten(1))

    def _nested_stage(self, stage, x):
        for block in stage:
            x = self._checkpoint(block, block, x)
        return x

    def _checkpoint(self, module, function, *inputs):
        contexts = lambda: (contextlib.nullcontext(), self._frozen_statistics(module))  # noqa: E731
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    @staticmethod
    @contextlib.contextmanager
    def _frozen_statistics(module):
        # Recomputing a BatchNorm would update its running statistics a second time.
        norms = [norm for norm in module.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        try:
            for norm in norms:
                norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
            yield
        finally:
            for norm, (momentum, batches) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, batches
