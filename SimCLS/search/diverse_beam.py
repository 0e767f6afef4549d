"""Diverse (group) beam search (Vijayakumar et al. 2016, algorithm 1) for any encoder-decoder of transformers 5.

Since 4.57, transformers has no group beam search. This returns the same tokens in the same order as 4.56.2's
`generate(num_beams=N, num_beam_groups=G, diversity_penalty=p, num_return_sequences=N)`.

The beams of a document form groups. At each step, the groups choose their tokens one after another; a token's score is
reduced by the diversity penalty for every beam of an earlier group that chose it at this step (Hamming diversity).
Each group is a beam search: it keeps as many ended hypotheses as it has beams, ranked by their log-probability
(including penalties) divided by length ** length_penalty.
"""

import itertools
from typing import NamedTuple

import torch

from harness.devices import widest_float
from search.hypotheses import Hypotheses, take
from search.token_rules import TokenRules

# Steps between two checks for ended beams. Each check synchronises with a GPU; on a CPU it is free.
STEPS_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}
# Rows of ended beams are removed once they are this share of the batch, since moving the others has a cost.
WORTH_LEAVING = 1 / 8
# Columns in a block of `top_k`.
BLOCK = 128
# Logits from which the best tokens are chosen together. On a CPU a mebibyte of float32, which stays in a core's cache.
LOGITS_TOGETHER = {"cpu": 2**18}


class Candidates(NamedTuple):
    """What a search found for a batch of documents, best first."""

    tokens: torch.Tensor  # int64 [documents, candidates, length]: start token first, padded after the end token.
    scores: torch.Tensor  # float32 [documents, candidates], by which they are ranked.
    log_probs: torch.Tensor  # wide float [documents, candidates]: the model's own, summed over `lengths` tokens.
    lengths: torch.Tensor  # int64 [documents, candidates]: tokens after the start token, including the end token.


class DiverseBeamSearch(TokenRules):
    """Diverse beam search with one model. A call takes one batch of documents.

    model: as for TokenRules.
    num_beams: candidates per document; a multiple of num_groups. One group is plain beam search.
    diversity_penalty: at least 0, in units of log-probability.
    max_length: the most tokens of a candidate, including start and end token; at least 2.
    min_length: the fewest tokens before an end token, including the start token.
    length_penalty: the exponent of the length by which a score is divided.
    no_repeat_ngram_size: no n-gram of this size occurs twice in a candidate; 0 allows all.
    early_stopping: when a group stops once it has as many ended hypotheses as beams. True: at once. False: when the
        best continuation of its beams, if it ended now, would not replace one, as in the group search of transformers
        4.56.2; the library's plain beam search leaves out what has just ended, and may stop sooner. "never": when that
        continuation could not replace one at any length.
    decoder: as for TokenRules.

    Raises ValueError for contradictory settings, and for unsupported settings in the generation config (such as a
    repetition penalty).
    """

    def __init__(
        self,
        model,
        *,
        num_beams,
        num_groups,
        diversity_penalty,
        max_length,
        min_length=0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        early_stopping=False,
        decoder=None,
    ):
        if num_beams % num_groups:
            raise ValueError(f"{num_beams} beams cannot be divided equally among {num_groups} groups")
        # Beyond these bounds, scores could overflow float32.
        if not abs(length_penalty) <= 10:
            raise ValueError(f"a length penalty of {length_penalty} is not between -10 and 10")
        if not 0 <= diversity_penalty <= 1e30:
            raise ValueError(f"a diversity penalty of {diversity_penalty} is not between 0 and 1e30")
        super().__init__(model, max_length, min_length, no_repeat_ngram_size, decoder)
        self.num_beams, self.num_groups, self.group_size = num_beams, num_groups, num_beams // num_groups
        self.diversity_penalty = diversity_penalty
        self.early_stopping, self.rewards_length = early_stopping, length_penalty > 0
        # By number of tokens after the start token. A tensor, since CUDA multiplies by the inverse of a Python number.
        divisors = [1.0] + [float(length) ** length_penalty for length in range(1, max_length)]
        self.divisors = torch.tensor(divisors, dtype=widest_float(self.device), device=self.device)
        # So many of a group's best tokens that at least as many as it has beams are not end tokens.
        self.offers = max(2, 1 + len(self.end_tokens)) * self.group_size

    @torch.inference_mode()
    def __call__(self, input_ids, attention_mask, encoded=None):
        """The Candidates of a batch of documents. input_ids, attention_mask: int64 [documents, length], padded at the
        end. encoded: as from `encode`, if they are encoded already."""
        documents = len(input_ids)
        beams = Beams(self, documents)
        self.decoder.start(encoded or self.encode(input_ids, attention_mask), self.max_length)
        rows = None  # The beam of each decoder row. Until the first token, a document's beams share one row.
        look = STEPS_BETWEEN_LOOKS.get(self.device.type, 8)
        for length in range(1, self.max_length):
            history = beams.tokens[:, 0, :length] if rows is None else beams.tokens.flatten(0, 1)[rows, :length]
            offers = self._best_tokens(self.decoder.step(history[:, -1]), history)
            if rows is None:
                rows = torch.arange(documents * self.num_beams, device=self.device)
                self.decoder.spread(self.num_beams)
                offers = [offer.repeat_interleave(self.num_beams, dim=0) for offer in offers]
            parents = beams.advance(*_place(rows, documents * self.num_beams, *offers), length)
            if self.group_size > 1:
                position = torch.empty_like(parents).index_copy_(0, rows, torch.arange(len(rows), device=self.device))
                self.decoder.reorder(position[parents[rows]])
            if length % look == 0:
                is_open = ~beams.done.repeat_interleave(self.group_size, dim=1).flatten()[rows]
                left = int(is_open.sum())
                if left == 0:
                    break
                if left <= (1 - WORTH_LEAVING) * len(rows):
                    kept = is_open.nonzero().squeeze(1)
                    self.decoder.keep(kept)
                    rows = rows[kept]
        return beams.best()

    def _best_tokens(self, logits, history):
        """Each row's best tokens, best first, each [rows, tokens]: (log-probabilities for the search, float32; ids,
        int64; the model's own log-probabilities, whatever is forced or forbidden, float32).

        logits: [rows, vocabulary]. history: int64 [rows, length].
        """
        together = max(1, LOGITS_TOGETHER.get(logits.device.type, logits.numel()) // logits.shape[1])
        parts = zip(logits.split(together), history.split(together), strict=True)
        return [torch.cat(found) for found in zip(*itertools.starmap(self._best_of_rows, parts), strict=True)]

    def _best_of_rows(self, logits, history):
        """`_best_tokens` for some of the rows."""
        # The penalties of earlier groups can displace at most as many tokens as these groups have beams.
        count = min(self.offers + self.num_beams - self.group_size, logits.shape[1])
        forced = self.forced.get(history.shape[1])
        if forced:
            scores, tokens = self._forced_tokens(forced, len(history), count)
            return scores, tokens, logits.float().log_softmax(-1).gather(1, tokens)
        scores, tokens = top_k(self.allowed(logits, history), count)
        # From logit differences, which saves a copy of all log-probabilities at each step.
        chosen = logits.gather(1, tokens).float()
        return scores, tokens, scores[:, :1] + (chosen - chosen[:, :1])

    def _forced_tokens(self, forced, rows, count):
        scores = torch.full((rows, count), float("-inf"), device=self.device)
        scores[:, : len(forced)] = 0
        other = next(token for token in itertools.count() if token not in self.end_tokens.tolist())
        tokens = torch.tensor(forced + [other] * (count - len(forced)), device=self.device)
        return scores, tokens.expand(rows, -1)


class Beams:
    """The open beams and the ended hypotheses of a batch of documents, by group."""

    def __init__(self, search, documents):
        self.search = search
        shape = (documents, search.num_beams)
        self.tokens = torch.full((*shape, search.max_length), search.pad_token, device=search.device)
        self.tokens[:, :, 0] = search.start_token
        # All but the first beam of a group start with a hopeless score: equal beams would choose equal tokens.
        self.scores = torch.full(shape, -1e9, device=search.device)
        self.scores[:, :: search.group_size] = 0
        self.log_probs = torch.zeros(shape, dtype=search.divisors.dtype, device=search.device)
        self.done = torch.zeros(documents, search.num_groups, dtype=torch.bool, device=search.device)
        self.ended = Hypotheses(documents, search.num_groups, search.group_size, search.max_length, search.device)

    def advance(self, scores, tokens, log_probs, length):
        """Add one token to every open beam.

        scores, tokens, log_probs: [documents * num_beams, offers], of each beam's best tokens. length: tokens of a beam
        so far.
        Returns the beam that each beam continues, int64 [documents * num_beams]; always of the same group.
        """
        search = self.search
        tops, top_tokens, ends, places, nexts = self._choose(scores, tokens, length)
        top_parents = places // scores.shape[-1]
        log_probs = (log_probs + self.log_probs.flatten().unsqueeze(1)).view(*places.shape[:2], -1).gather(2, places)
        groups = self.tokens.unflatten(1, (search.num_groups, search.group_size))
        for rank in range(search.group_size):
            hypothesis = take(groups, top_parents[:, :, rank : rank + 1]).squeeze(2)
            hypothesis[:, :, length] = top_tokens[:, :, rank]  # Which of several end tokens it is: one may be text.
            score = tops[:, :, rank].to(search.divisors.dtype) / search.divisors[length]
            self.ended.add(ends[:, :, rank] & ~self.done, score, log_probs[:, :, rank], hypothesis, length)
        was_done = self.done.unsqueeze(2)
        self.done = self.done | self._cannot_improve(tops[:, :, 0].to(search.divisors.dtype), length)

        here = torch.arange(search.group_size, device=search.device)
        parents = torch.where(was_done, here, top_parents.gather(2, nexts))
        next_tokens = torch.where(was_done, search.pad_token, top_tokens.gather(2, nexts))
        self.scores = torch.where(was_done, 0.0, tops.gather(2, nexts)).flatten(1)
        self.log_probs = torch.where(was_done, 0.0, log_probs.gather(2, nexts)).flatten(1)
        if search.group_size > 1:
            self.tokens = take(groups, parents).flatten(1, 2)
        self.tokens[:, :, length] = next_tokens.flatten(1)
        first = torch.arange(0, self.scores.numel(), search.group_size, device=search.device)
        return (first.view(-1, search.num_groups, 1) + parents).flatten()

    def _choose(self, scores, tokens, length):
        """Let the groups choose in turn.

        Returns each group's best continuations, best first: scores, tokens, whether they are end tokens, and their
        places among the offers of all beams of the group, each [documents, groups, offers]; and the places in these of
        the continuations that its beams take, [documents, groups, group size].
        """
        search = self.search
        documents, size = len(self.tokens), search.group_size
        scores, tokens = (x.view(documents, search.num_groups, size, -1) for x in (scores, tokens))
        penalty = 0 if search.forced.get(length) else search.diversity_penalty
        # What does not depend on the choices of earlier groups is computed for all groups at once.
        beam_scores = self.scores.view(documents, search.num_groups, size, 1)
        flat_tokens = tokens.flatten(2)
        flat_ends = torch.isin(flat_tokens, search.end_tokens)
        taken = tokens.new_empty(documents, 0)
        chosen = []
        for group in range(search.num_groups):
            group_scores = scores[:, group]
            if group and penalty:
                times_taken = (tokens[:, group].unsqueeze(-1) == taken[:, None, None]).sum(-1)
                group_scores = group_scores - penalty * times_taken
            top, place = (group_scores + beam_scores[:, group]).flatten(1).topk(search.offers)
            top_tokens, ends = flat_tokens[:, group].gather(1, place), flat_ends[:, group].gather(1, place)
            nexts = _first_open(ends, size)
            chosen.append((top, top_tokens, ends, place, nexts))
            if penalty:
                next_tokens = top_tokens.gather(1, nexts).masked_fill(self.done[:, group, None], search.pad_token)
                taken = torch.cat([taken, next_tokens], dim=1)
        return [torch.stack(parts, dim=1) for parts in zip(*chosen, strict=True)]

    def _cannot_improve(self, best, length):
        search = self.search
        full = self.ended.count == search.group_size
        if search.early_stopping is True:
            return full
        furthest = search.max_length - 1 if search.early_stopping == "never" and search.rewards_length else length
        return full & (self.ended.worst() >= best / search.divisors[furthest])

    def best(self):
        """All hypotheses of each document as Candidates."""
        search = self.search
        scores = self.scores.to(search.divisors.dtype).unflatten(1, self.done.shape[1:] + (-1,)) / search.divisors[-1]
        groups = self.tokens.unflatten(1, (search.num_groups, search.group_size))
        log_probs = self.log_probs.view_as(scores)
        for rank in range(search.group_size):
            open_beams = scores[:, :, rank], log_probs[:, :, rank], groups[:, :, rank]
            self.ended.add(~self.done, *open_beams, search.max_length)
        tokens, scores, log_probs, lengths = self.ended.ranked()
        longest = min(int(lengths.max()) + 1, search.max_length)
        tokens, column = tokens[:, :, :longest], torch.arange(longest, device=search.device)
        # With the end token, which candidates that were cut at the maximum length do not have.
        tokens = torch.where(column <= lengths.unsqueeze(2), tokens, search.pad_token)
        return Candidates(tokens, scores.float(), log_probs, lengths.clamp(max=search.max_length - 1))


def _first_open(ends, count):
    """The places of the first `count` False in each row of `ends`, then of the first True: int64 [rows, count]."""
    if count == 1:
        return ends.byte().argmin(dim=1, keepdim=True)
    return ends.byte().argsort(dim=1, stable=True)[:, :count]


def top_k(scores, count):
    """`scores.topk(count)` for float [rows, columns]; 5 times as fast on a CPU with a vocabulary of 32,000.

    The `count` best columns are in the `count` blocks of columns with the highest maxima.
    """
    whole = scores.shape[1] // BLOCK * BLOCK
    if whole < 2 * count * BLOCK:
        return scores.topk(count)
    blocks = scores[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1).topk(count, sorted=False).indices
    columns = (blocks.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    rest = torch.arange(whole, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], dim=1)
    best, place = scores.gather(1, columns).topk(count)
    return best, columns.gather(1, place)


def _place(rows, total, *tensors):
    """Each tensor [rows, columns] scattered to its `rows` of [total, columns]; the other rows are 0."""
    if len(rows) == total:
        return tensors
    return [tensor.new_zeros(total, tensor.shape[1]).index_copy_(0, rows, tensor) for tensor in tensors]
