"""Measurements of a scorer in training: the loss, the spread of the scores, and the ROUGE of its choices."""

import numpy as np
import torch
from data_utils import ROUGE
from model import ranking_loss, score_samples

from harness.devices import widest_float
from harness.timing import nvtx_range

MOST_UPDATES_A_REPORT = 50  # The most updates between reports; with more, a collapse would be noticed too late.


def loss_of(args, scores, gold_scores, batch):
    """The mean loss of a batch's documents with the run's loss arguments. scores, gold_scores: from a Scorer."""
    settings = args.margin, args.gold_margin, args.gold_weight
    return ranking_loss(scores, gold_scores, batch.rouge, batch.present, *settings)


class Metrics(torch.nn.Module):
    """Sums over the documents of an epoch and of a report, on the device: no synchronisation until one of these ends.

    last_batch: the Batch that was added last.
    """

    def __init__(self, device):
        super().__init__()
        # [epoch, report] x [documents, loss, spread of the scores]
        self.register_buffer("totals", torch.zeros(2, 3, dtype=widest_float(device), device=device))
        self.last_batch = None

    @torch.no_grad()
    def add(self, loss, scores, batch, weight):
        """Add a batch. loss: its mean, a scalar. scores: of its candidates, float [documents, candidates]. weight: 0
        leaves it out."""
        self.last_batch = batch
        if not weight:
            return
        highest = scores.masked_fill(~batch.present, -2).amax(1)
        lowest = scores.masked_fill(~batch.present, 2).amin(1)
        means = torch.stack([torch.ones_like(loss), loss, (highest - lowest).mean()])
        self.totals += len(scores) * means.to(self.totals.dtype)

    def epoch_loss(self, world):
        """The epoch's mean loss over all processes. Resets the epoch's sums."""
        return self._take(0, world)[0]

    def report(self, world):
        """(loss, spread) since the last report; the spread is the highest minus the lowest score, averaged over
        documents. Resets the report's sums."""
        return self._take(1, world)

    def flat_loss(self, args):
        """The loss that this process's last batch would have if all scores were equal."""
        zeros = torch.zeros_like(self.last_batch.rouge)
        return float(loss_of(args, zeros, zeros[:, 0], self.last_batch))

    def _take(self, row, world):
        documents, *sums = world.sum(self.totals[row].clone()).tolist()
        self.totals[row] = 0
        return [value / documents for value in sums]

    def gather(self, world):
        """Move the sums of all processes to the main process, whose state is saved."""
        totals = world.sum(self.totals.clone())
        self.totals.copy_(totals if world.is_main else torch.zeros_like(totals))


class CollapseWatch:
    """Detects within 100 updates that a scorer gives all candidates of a document the same score, from reports at most
    MOST_UPDATES_A_REPORT updates apart.

    Scores count as the same if their spread is below a quarter of `margin`, the target distance of two neighbours. A
    fresh encoder may begin like that, so it is not a collapse during warm-up, nor while the spread grows.
    """

    def __init__(self, margin):
        self.margin, self.warmup = margin, 0
        self._were_apart = False
        self._same = []  # [update, spread] of the reports since the scores became the same.
        self._told = False

    def sees_collapse(self, update, spread):
        """Whether the report of `spread` at `update` shows a collapse that has not been reported yet."""
        if spread >= self.margin / 4:
            self._were_apart, self._same, self._told = True, [], False
            return False
        self._same.append([update, spread])
        self._same = self._same[-MOST_UPDATES_A_REPORT - 1 :]
        first, spread_then = self._same[0]
        lasting = update - first >= MOST_UPDATES_A_REPORT and spread < 2 * spread_then
        collapsed = lasting and not self._told and (self._were_apart or update > self.warmup)
        self._told |= collapsed
        return collapsed

    def state_dict(self):
        return {"were_apart": self._were_apart, "same": self._same, "told": self._told}

    def load_state_dict(self, state):
        self._were_apart, self._same, self._told = state["were_apart"], state["same"], state["told"]


def validate(scorer, samples, args, precision, world, stop=None):
    """The loss and the mean ROUGE of the candidates that the scorer chooses, {"val_loss", "val_rouge1", ...}, and that
    of each document's first candidate, {"first_rouge1", ...}.

    Each process scores its share of the SampleSet `samples`, every sample once. After a stop request, returns None.
    """
    if stop:  # Here too, since a process may have no samples, and would wait for the others' sums.
        return None
    numbers = np.argsort(samples.document_lengths, kind="stable")[world.rank :: world.size]
    losses, chosen = torch.zeros((), dtype=widest_float(world.device), device=world.device), []
    with nvtx_range("validation"):
        batches = score_samples(scorer, samples, numbers, 2 * args.batch_size, world.device, precision)
        for part, batch, scores, gold_scores in batches:
            if stop:
                batches.close()
                return None
            losses += len(part) * loss_of(args, scores, gold_scores, batch).to(losses.dtype)
            chosen.append(scores.masked_fill(~batch.present, -2).argmax(1))
        chosen = torch.cat(chosen).tolist() if chosen else []
    figures = [samples.figures("rouge", number)[[choice, 0]] for number, choice in zip(numbers, chosen, strict=True)]
    rouge = np.sum(figures, axis=0, dtype=np.float64).ravel() if figures else np.zeros(2 * len(ROUGE))
    totals = torch.tensor([len(numbers), losses.item(), *rouge], dtype=losses.dtype, device=world.device)
    count, *sums = world.sum(totals).tolist()
    names = ["val_loss", *(f"{whose}_{name}" for whose in ("val", "first") for name in ROUGE)]
    return {name: value / count for name, value in zip(names, sums, strict=True)}


def mean_rouge(result):
    """The mean of the three ROUGE values of a validation; it decides which scorer is the best."""
    return sum(result[f"val_{name}"] for name in ROUGE) / len(ROUGE)
