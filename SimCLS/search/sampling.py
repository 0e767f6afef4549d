"""Nucleus sampling (Holtzman et al. 2020) for any encoder-decoder of transformers 5.

A document's random numbers depend only on the seed and its own tokens. So its candidates depend neither on its batch
(except for rounding) nor on earlier draws.
"""

import hashlib
import json

import torch

from harness.devices import widest_float
from search.diverse_beam import Candidates
from search.hypotheses import take
from search.token_rules import TokenRules

# Further settings of a generation config that would change the draws, with their neutral values. The library writes
# top_k 50 if nobody has set it.
UNSUPPORTED = {
    "temperature": (None, 1.0),
    "top_k": (None, 0, 50),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}


class NucleusSampling(TokenRules):
    """Draws each token from the nucleus: the fewest most likely tokens with a total probability of at least `top_p`.
    A call takes one batch of documents.

    num_samples: candidates per document. top_p: above 0, at most 1. seed: int. The rest is as for DiverseBeamSearch.

    Raises ValueError as TokenRules does, and for a temperature and other settings that would change the draws.
    """

    unsupported = TokenRules.unsupported | UNSUPPORTED

    def __init__(
        self, model, *, num_samples, top_p, seed, max_length, min_length=0, no_repeat_ngram_size=0, decoder=None
    ):
        super().__init__(model, max_length, min_length, no_repeat_ngram_size, decoder)
        self.num_samples, self.top_p, self.seed = num_samples, top_p, seed

    @torch.inference_mode()
    def __call__(self, input_ids, attention_mask, encoded=None):
        """The Candidates of a batch of documents, highest mean log-probability per token first. The arguments are as
        for DiverseBeamSearch."""
        documents, total = len(input_ids), len(input_ids) * self.num_samples
        uniform = self._draws(input_ids, attention_mask)
        tokens = torch.full((total, self.max_length), self.pad_token, device=self.device)
        tokens[:, 0] = self.start_token
        log_probs = torch.zeros(total, dtype=widest_float(self.device), device=self.device)
        lengths = torch.full((total,), self.max_length - 1, device=self.device)
        rows = torch.arange(total, device=self.device)  # The candidate of each decoder row.
        self.decoder.start(encoded or self.encode(input_ids, attention_mask), self.max_length)
        for length in range(1, self.max_length):
            if length == 1:  # Until the first token, a document's candidates share one row.
                logits = self.decoder.step(tokens[:documents, 0]).repeat_interleave(self.num_samples, dim=0)
                self.decoder.spread(self.num_samples)
            else:
                logits = self.decoder.step(tokens[rows, length - 1])
            chosen = self._choose(logits, tokens[rows, :length], uniform[rows, length])
            tokens[rows, length] = chosen
            log_probs[rows] += logits.float().log_softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)
            is_open = ~torch.isin(chosen, self.end_tokens)
            lengths[rows[~is_open]] = length
            if not is_open.all():
                kept = is_open.nonzero().squeeze(1)
                rows = rows[kept]
                if not len(rows):
                    break
                self.decoder.keep(kept)
        return self._ranked(tokens, log_probs, lengths)

    def _draws(self, input_ids, attention_mask):
        """Uniform random numbers in [0, 1), float32 [documents * num_samples, max_length]."""
        draws = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            text = json.dumps([self.seed, ids[: sum(mask)]])
            generator = torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16))
            draws.append(torch.rand(self.num_samples, self.max_length, generator=generator))
        return torch.cat(draws).to(self.device)

    def _choose(self, logits, history, uniform):
        """The next token of each row, int64 [rows]. uniform: float32 [rows]."""
        forced = self.forced.get(history.shape[1])
        if forced:
            return torch.full((len(history),), forced[0], device=self.device)
        probabilities, order = self.allowed(logits, history).softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        reached = probabilities.masked_fill(before >= self.top_p, 0.0).cumsum(-1)
        place = (reached <= uniform.unsqueeze(1) * reached[:, -1:]).sum(-1, keepdim=True)
        # Rounding must not lead beyond the end of the nucleus. The nucleus has at least one token, even if top_p rounds
        # to 0, or if logits are NaN, which the log-probabilities then show.
        place = torch.minimum(place, (before < self.top_p).sum(-1, keepdim=True) - 1).clamp(min=0)
        return order.gather(1, place).squeeze(1)

    def _ranked(self, tokens, log_probs, lengths):
        shape = (-1, self.num_samples)
        scores = (log_probs / lengths).view(shape)
        order = scores.argsort(dim=1, descending=True, stable=True)
        longest = min(int(lengths.max()) + 1, self.max_length)
        tokens = take(tokens[:, :longest].view(*scores.shape, longest), order)
        return Candidates(tokens, *(each.view(shape).gather(1, order) for each in (scores.float(), log_probs, lengths)))
