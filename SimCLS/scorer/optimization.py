"""Updating a scorer: the learning rate, gradient clipping, and the random state of a step."""

import numpy as np
import torch


class Schedule:
    """The learning rate: rises linearly to `peak` in the first `warmup` of `updates`, then falls linearly to 0.

    It depends on the optimizer's own count of its updates, so those that a GradScaler skips do not count. Count and
    rate stay on the device, without synchronisation. optimizer: with fused=True.
    """

    def __init__(self, optimizer, peak, warmup, updates):
        self.optimizer, self.peak, self.warmup, self.updates = optimizer, peak, warmup, updates
        self._parameter = optimizer.param_groups[0]["params"][0]
        self.rate = torch.zeros((), device=self._parameter.device)

    @classmethod
    def of_run(cls, args, optimizer, width, updates_an_epoch):
        """The Schedule by a run's arguments, for an encoder of hidden size `width`."""
        updates = args.num_epoch * updates_an_epoch
        peak = args.lr or 3e-5 * (768 / width) ** 1.5  # By default 3e-5 for a base model, higher for smaller ones.
        return cls(optimizer, peak, max(1, round(args.warmup * updates)), updates)

    def set(self):
        """Set the optimizer's learning rate for its next update."""
        made = self.optimizer.state[self._parameter].get("step", torch.zeros_like(self.rate))
        falling = (self.updates - made) / max(1, self.updates - self.warmup)
        self.rate = self.peak * torch.minimum((made + 1) / self.warmup, falling).clamp(0, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


def seed_step(seed, epoch, step, rank):
    """Make a step's dropout depend only on these arguments, so that resuming needs no saved random states."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0]))


def clip_gradients(model, norm):
    """Scale the gradients down to the norm `norm` if theirs is higher; 0 leaves them unchanged."""
    if norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
