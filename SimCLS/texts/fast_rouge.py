"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, stemmed: the figures of the `rouge-score` package, many times faster.

    reference = RougeReference(["The cat sat.", "It slept."])
    reference.score(["A cat was sitting."]).rougeLsum.fmeasure

A reference is tokenized, stemmed and counted once for all its candidates. A word is stemmed once a process. The
longest common subsequence (LCS) takes one addition of whole numbers for each candidate token that the reference has.

Sources: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries" (the metrics); the `rouge-score` package
0.1.2 (their details, and the oracle of the tests); Crochemore et al. 2001, "A fast and practical bit-vector
algorithm for the longest common subsequence problem", and Hyyrö 2004, "Bit-parallel LCS-length computation
revisited" (the LCS).
"""

from collections import Counter
from itertools import chain, pairwise, repeat
from typing import NamedTuple

import numpy as np
from nltk.stem.porter import PorterStemmer
from utils import map_in_order

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# Documents that a worker process takes at a time.
CHUNK = 64


class Score(NamedTuple):
    """Precision, recall and their harmonic mean, each from 0 to 1."""

    precision: float
    recall: float
    fmeasure: float


class RougeScores(NamedTuple):
    """The scores of one candidate."""

    rouge1: Score
    rouge2: Score
    rougeL: Score
    rougeLsum: Score

    @property
    def mean(self):
        """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-Lsum: the score by which SimCLS orders candidates."""
        return (self.rouge1.fmeasure + self.rouge2.fmeasure + self.rougeLsum.fmeasure) / 3


class RougeReference:
    """A reference summary, ready to score any number of candidates.

    sentences: list of str. As in `rouge-score`, a newline ends a sentence too, and sentences matter to ROUGE-Lsum only.
    """

    def __init__(self, sentences):
        lines = _stem_lines(sentences)
        tokens = list(chain.from_iterable(lines))
        self._length = len(tokens)
        self._unigrams = Counter(tokens)
        self._bigrams = Counter(pairwise(tokens))
        # One bit for each token, and an empty guard bit after each sentence, where the carry of an addition ends.
        self._positions = dict.fromkeys(self._unigrams, 0)
        self._sentences = []
        start = 0
        for line in lines:
            for bit, token in enumerate(line, start):
                self._positions[token] |= 1 << bit
            self._sentences.append((1 << start + len(line)) - (1 << start))
            start += len(line) + 1
        self._tokens = sum(self._sentences)
        self._tokens_and_guards = (1 << start) - 1

    def score(self, sentences):
        """RougeScores of a candidate summary. sentences: list of str."""
        lines = _stem_lines(sentences)
        tokens = lines[0] if len(lines) == 1 else list(chain.from_iterable(lines))
        length = len(tokens)
        unigrams = Counter(filter(self._unigrams.__contains__, tokens))
        if not unigrams:
            return _NOTHING_IN_COMMON
        bigrams = Counter(filter(self._bigrams.__contains__, pairwise(tokens)))
        lcs = self._lcs(tokens)
        one_sentence_each = len(lines) == len(self._sentences) == 1
        union = lcs if one_sentence_each else self._union_lcs(lines, unigrams)
        return RougeScores(
            _score(_overlap(unigrams, self._unigrams), length, self._length),
            _score(_overlap(bigrams, self._bigrams), length - 1, self._length - 1),
            _score(lcs, length, self._length),
            _score(union, length, self._length),
        )

    def _lcs(self, tokens):
        """Length of the LCS of the whole reference and `tokens`.

        After each token, bit i of `row` is 0 where the LCS of the tokens so far grows from i to i + 1 reference
        tokens (Hyyrö 2004, figure 3).
        """
        row = self._tokens_and_guards
        for positions in filter(None, map(self._positions.get, tokens)):
            matches = row & positions
            row = (row + matches) | (row - matches)
        return (~row & self._tokens_and_guards).bit_count()

    def _union_lcs(self, lines, counts):
        """Hits of ROUGE-Lsum: reference tokens in the union of the LCSs with each candidate sentence.

        Of tokens with equal stems at most as many count as the candidate has (`counts`).
        """
        union = 0
        for line in lines:
            columns, grown = self._columns(line)
            for sentence in self._sentences:
                if grown & sentence:
                    union |= _backtrack(columns, sentence)
        return sum(min(count, (union & self._positions[token]).bit_count()) for token, count in counts.items())

    def _columns(self, line):
        """The LCS table of one candidate sentence with every reference sentence at once: (columns, grown).

        columns: a list of (positions, stops), one for each token that the reference has and one for each run of
        tokens that it has not: the bits of the token, and those together with the bits where the LCS grows from one
        reference token to the next. grown: the latter after the last column.
        """
        columns = []
        row = inside = self._tokens
        before = None
        for positions in map(self._positions.get, line, _ZEROS):
            if positions:
                matches = row & positions
                row = ((row + matches) | (row - matches)) & inside
                columns.append((positions, positions | ~row))
            elif before != 0:
                columns.append((0, ~row))
            before = positions
        return columns, inside & ~row


def score_corpus(references, candidates, workers=1):
    """Score many documents' candidates; the work of `workers` processes, in order, in bounded memory.

    references: iterable of references, each a list of sentences. candidates: iterable of lists of candidates, each a
    list of sentences. Yields for each document a float64 array [candidate, metric, figure]: metrics in the order of
    METRICS, figures in that of Score.
    """
    documents = zip(references, candidates, strict=True)
    yield from map_in_order(score_document, documents, workers, CHUNK)


def score_document(document):
    """One document of `score_corpus`: (reference, candidates) -> array [candidate, metric, figure]."""
    sentences, candidates = document
    reference = RougeReference(sentences)
    scores = [reference.score(candidate) for candidate in candidates]
    return np.array(scores, dtype=np.float64).reshape(len(candidates), len(METRICS), len(Score._fields))


def forget_stems():
    """Empty the stem cache, so that a benchmark starts as a new process does."""
    _STEMS.clear()


class _Stems(dict):
    """The stem of each word (bytes -> str), found once; emptied when full, so that memory stays bounded."""

    CAPACITY = 200_000

    def __init__(self):
        self._stemmer = PorterStemmer()

    def __missing__(self, token):
        if len(self) >= self.CAPACITY:
            self.clear()
        word = token.decode("ascii")
        # As `rouge-score` does, words of three letters or fewer are left alone.
        self[token] = stem = self._stemmer.stem(word) if len(word) > 3 else word
        return stem


_STEMS = _Stems()
_KEPT = b"abcdefghijklmnopqrstuvwxyz0123456789\n"
_OTHERS_TO_SPACES = bytes(byte if byte in _KEPT else ord(" ") for byte in range(256))
_ZEROS = repeat(0)


def _stem_lines(sentences):
    """The stems of each line that has a token: runs of a-z and 0-9 in the lower-cased text, nothing else."""
    text = "\n".join(sentences).lower().encode("ascii", "replace").translate(_OTHERS_TO_SPACES)
    return [list(map(_STEMS.__getitem__, words)) for line in text.split(b"\n") if (words := line.split())]


def _backtrack(columns, sentence):
    """The bits of one LCS of a reference and a candidate sentence: the one that `rouge-score` reads off its table.

    It goes up the table's last column, and takes the first match. Where there is none but the LCS grows by this
    reference token, it goes on from there in the column before. The highest set bit finds either in one step.

    columns: as from `RougeReference._columns`. sentence: the bits of the reference sentence.
    """
    taken = 0
    left = sentence
    for positions, stops in reversed(columns):
        here = left & stops
        if not here:
            break
        stop = 1 << here.bit_length() - 1
        if positions & stop:
            taken |= stop
            left &= stop - 1
        else:
            left &= 2 * stop - 1
    return taken


def _overlap(candidate, reference):
    return sum(min(count, reference[item]) for item, count in candidate.items())


def _score(hits, candidate_count, reference_count):
    precision = hits / max(candidate_count, 1)
    recall = hits / max(reference_count, 1)
    fmeasure = 2 * precision * recall / (precision + recall) if hits else 0.0
    return Score(precision, recall, fmeasure)


_NOTHING_IN_COMMON = RougeScores(*[Score(0.0, 0.0, 0.0)] * len(METRICS))
