"""The ended hypotheses of a beam search, kept on the device for many groups of beams at once."""

import torch

from harness.devices import widest_float


class Hypotheses:
    """The best `size` ended hypotheses of every group of every document.

    Between equal scores the order of arrival decides, as in a list that is appended to and whose first worst entry is
    deleted.
    """

    def __init__(self, documents, groups, size, max_length, device):
        shape = (documents, groups, size)
        self.scores = torch.full(shape, float("inf"), dtype=widest_float(device), device=device)
        self.log_probs = torch.zeros(shape, dtype=widest_float(device), device=device)
        self.lengths = torch.zeros(shape, dtype=torch.long, device=device)
        self.came = torch.zeros(shape, dtype=torch.long, device=device)
        self.tokens = torch.zeros((*shape, max_length), dtype=torch.long, device=device)
        self.count = torch.zeros(shape[:2], dtype=torch.long, device=device)
        self.clock = 0

    def worst(self):
        """The lowest score of each group, wide float [documents, groups]."""
        return self.scores.amin(-1)

    def add(self, offered, scores, log_probs, tokens, length):
        """Offer one hypothesis to each group where `offered`, bool [documents, groups], is true.

        scores, log_probs: wide float [documents, groups] (float64, except on MPS). tokens: int64 [documents, groups,
        max_length], of which the first `length` are used, and the end token after them.
        """
        self.clock += 1
        size = self.scores.shape[2]
        worst, full = self.worst(), self.count == size
        accepted = offered & (~full | (scores > worst))
        oldest_worst = self.came.masked_fill(self.scores > worst.unsqueeze(2), self.clock).argmin(-1)
        slot = torch.where(full, oldest_worst, self.count).unsqueeze(2)
        here = accepted.unsqueeze(2) & (torch.arange(size, device=slot.device) == slot)
        self.scores = torch.where(here, scores.unsqueeze(2), self.scores)
        self.log_probs = torch.where(here, log_probs.unsqueeze(2), self.log_probs)
        self.lengths = torch.where(here, length, self.lengths)
        self.came = torch.where(here, self.clock, self.came)
        self.tokens = torch.where(here.unsqueeze(3), tokens.unsqueeze(2), self.tokens)
        self.count += accepted & ~full

    def ranked(self):
        """All hypotheses of each document, best first; of equal ones the later comes first.

        Returns tokens [documents, hypotheses, max_length]; scores, log_probs and lengths [documents, hypotheses].
        """
        oldest_first = self.came.argsort(dim=2)
        kept = (self.scores, self.log_probs, self.lengths)
        scores, log_probs, lengths = (each.gather(2, oldest_first).flatten(1) for each in kept)
        tokens = take(self.tokens, oldest_first).flatten(1, 2)
        order = scores.flip(1).argsort(dim=1, descending=True, stable=True)
        order = scores.shape[1] - 1 - order
        return take(tokens, order), *(each.gather(1, order) for each in (scores, log_probs, lengths))


def take(tensor, index):
    """Gather whole vectors of `tensor`, which has one dimension more than `index`, along the last one of `index`."""
    return tensor.gather(index.dim() - 1, index.unsqueeze(-1).expand(*index.shape, tensor.shape[-1]))
