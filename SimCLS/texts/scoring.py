"""From the texts of a document, its summary and its candidates to a sample, with their ROUGE."""

import numpy as np

from texts.candidate_files import Lines
from texts.fast_rouge import RougeReference
from texts.sentences import ptb_tokenize


def build_sample(plain, tokenized, split):
    """The sample of one document as a dict of JSON values; see `score_sample`."""
    return score_sample(plain, tokenized, split)[0]


def score_sample(plain, tokenized, split):
    """(the sample of one document as a dict of JSON values, the RougeScores of its candidates)

    plain, tokenized: Lines. split: text -> list of sentences. Only white space between sentences is lost of the
    plain text.
    """
    abstract = split_lower(tokenized.target, split)
    reference = RougeReference(abstract)
    candidates = [split_lower(text, split) for text in tokenized.candidates]
    rouge = [reference.score(sentences) for sentences in candidates]
    scores = [each.mean for each in rouge]
    candidates_untok = [split(text) for text in plain.candidates]
    sample = {
        "article": split_lower(tokenized.source, split),
        "abstract": abstract,
        "candidates": list(zip(candidates, scores, strict=True)),
        "article_untok": split(plain.source),
        "abstract_untok": split(plain.target),
        "candidates_untok": list(zip(candidates_untok, scores, strict=True)),
    }
    return sample, rouge


def split_lower(text, split):
    """The sentences of a tokenized text, lower-cased after the split: capitals tell where sentences begin."""
    return [sentence.lower() for sentence in split(text)]


def as_sample(document, summary, candidates, split):
    """The sample that gen_candidate.py and preprocess.py would make, and under "rouge" what `rouge_of` returns.

    split: text -> list of sentences.
    """
    plain = Lines(document, summary, candidates)
    tokenized = Lines(ptb_tokenize(document), ptb_tokenize(summary), [ptb_tokenize(text) for text in candidates])
    sample, scores = score_sample(plain, tokenized, split)
    return sample | {"rouge": _figures(scores)}


def rouge_of(sample):
    """The candidates' ROUGE-1, -2 and -Lsum F-measure, float64 [candidates, 3]."""
    if "rouge" in sample:
        return sample["rouge"]
    reference = RougeReference(sample["abstract"])
    return _figures(reference.score(sentences) for sentences, _ in sample["candidates"])


def _figures(scores):
    return np.array([[each.rouge1.fmeasure, each.rouge2.fmeasure, each.rougeLsum.fmeasure] for each in scores])
