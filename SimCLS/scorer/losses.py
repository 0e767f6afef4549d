"""The losses that a scorer can learn by, `--loss`: they differ in what they ask of a document's candidates, and ask the
same of its reference."""

import torch
import torch.nn.functional as F
from model import gold_loss, ranking_loss

LOSSES = ("ranking", "margin", "listwise")


def loss_of(args, scores, gold_scores, batch):
    """The mean loss of a batch's documents with the loss arguments of the run. scores, gold_scores: of a Scorer."""
    if args.loss == "ranking":
        return ranking_loss(
            scores, gold_scores, batch.rouge, batch.present, args.margin, args.gold_margin, args.gold_weight
        )
    if args.loss == "margin":
        own = margin_loss(scores, batch.rouge, batch.present, args.margin)
    else:
        own = listwise_loss(scores, batch.rouge, batch.present, args.temperature)
    return (own + args.gold_weight * gold_loss(scores, gold_scores, batch.present, args.gold_margin)).mean()


def margin_loss(scores, rouge, present, margin):
    """Of two candidates the one with the lower ROUGE has to score lower by `margin` for each hundredth of ROUGE between
    them; what is missing, in the mean over the pairs of different ROUGE. float [documents].

    scores, rouge: float [documents, candidates]. present: bool [documents, candidates].
    """
    lower_by = rouge[:, :, None] - rouge[:, None, :]  # [document, candidate, a worse one]
    better = (lower_by > 0) & present[:, :, None] & present[:, None, :]
    missing = F.relu(scores[:, None, :] - scores[:, :, None] + 100 * margin * lower_by)
    return torch.where(better, missing, 0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)


def listwise_loss(scores, rouge, present, temperature):
    """How far the softmax of scores / temperature is from that of ROUGE / temperature: their Kullback-Leibler
    divergence, 0 where scores differ as ROUGE does. float [documents]; the arguments are as for `margin_loss`."""
    absent = torch.finfo(scores.dtype).min
    found = (scores / temperature).masked_fill(~present, absent).log_softmax(1)
    wanted = (rouge / temperature).masked_fill(~present, absent).log_softmax(1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).masked_fill(~present, 0).sum(1)
