"""Ways to choose one of a document's candidates: by a scorer, and by rules that cost almost nothing."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data_utils import SampleSet, TextEncoding, tokenize_samples
from model import check_scores, load_scorer, score_samples

from harness.arguments import positive_int
from harness.endings import UserError
from harness.precision import Precision, choose_precision
from pretrained.model_folders import half_precision_name
from scorer.combination import combine, per_token
from texts.rouge_scores import agreement


class Judge(NamedTuple):
    """A trained scorer, ready to score."""

    scorer: torch.nn.Module  # On its device.
    encoding: TextEncoding
    description: dict  # As from `load_scorer`.
    precision: Precision


def add_judge_arguments(parser):
    """Add the arguments of `load_judge`, except --half_precision, to an argument parser."""
    add = parser.add_argument
    add("--scorer_path", type=Path, help="trained scorer, such as cache/run/scorer.bin")
    add("--model_type", help="its encoder: folder, or name on the hub; by default that in scorer.json beside it")
    add("--total_len", type=positive_int, help="most tokens of a document for it; by default as in its training")
    add("--max_len", type=positive_int, help="most tokens of a summary for it; by default as in its training")


def check_scorer_path(args):
    """UserError if --scorer_path is not a file, or is missing while other arguments of the scorer are given."""
    for name in ("model_type", "total_len", "max_len"):
        if getattr(args, name) is not None and not args.scorer_path:
            raise UserError(f"--{name} goes with --scorer_path; add that, or leave it out")
    if args.scorer_path and not args.scorer_path.is_file():
        raise UserError(f"--scorer_path {args.scorer_path} is not a file; main.py writes cache/<run>/scorer.bin")


def load_judge(args, world, say=print):
    """The Judge by the arguments --scorer_path, --model_type, --total_len, --max_len and --half_precision."""
    scorer, encoding, description = load_scorer(args.model_type, args.scorer_path, args.total_len, args.max_len)
    half_precision = half_precision_name(args.half_precision, description["architecture"])
    precision = choose_precision(half_precision, world.device, true_fp32=True, say=say)
    return Judge(scorer.to(world.device), encoding, description, precision)


def score_candidates(scorer, encoding, samples, batch_size, device, precision):
    """The scorer's scores of each sample's candidates, a list of float64 [candidates]. UserError if one is not finite.

    samples: list of dicts as from `read_sample`, in any order.
    """
    dataset = SampleSet(tokenize_samples(samples, encoding, sys.maxsize), encoding, device.type, precision.dtype)
    numbers = np.argsort(dataset.document_lengths, kind="stable")
    found = [None] * len(samples)
    for part, _, scores, _ in score_samples(scorer, dataset, numbers, batch_size, device, precision):
        for number, own in zip(part, scores.cpu().double().numpy(), strict=True):
            found[number] = own[: len(samples[number]["candidates"])]
            check_scores(found[number], scorer)
    return found


def with_agreement(samples, rouge_tokens="standard"):
    """The `samples`, dicts as from `read_sample`, with the "agreement" of their candidates (see texts.rouge_scores)."""
    return [
        sample | {"agreement": agreement([text for text, _ in sample["candidates"]], rouge_tokens)}
        for sample in samples
    ]


def by_scorer(scores, samples, weights=None):
    """The index of the best candidate of each sample, int64 [samples].

    scores: as from `score_candidates`. samples: as from `with_agreement`. weights: as from `combination.fit`; None uses
    only the scores.
    """
    if weights:
        scores = [
            combine(own, sample.get("likelihood"), sample["agreement"], weights)
            for own, sample in zip(scores, samples, strict=True)
        ]
    return np.array([own.argmax() for own in scores])


def by_rules(samples):
    """Rule -> the index of the candidate that it chooses in each sample, int64 [samples].

    samples: as from `with_agreement`. "most likely" is the highest mean log-probability per token, and is left out
    without likelihoods. "Bayes risk" chooses the candidate with the lowest, which agrees most with the others.
    """
    rules = {"generator": lambda sample: 0}
    if all("likelihood" in sample for sample in samples):
        rules["most likely"] = lambda sample: per_token(sample["likelihood"], 1).argmax()
    rules["longest"] = lambda sample: np.argmax([words(sentences) for sentences, _ in sample["candidates_untok"]])
    rules["Bayes risk"] = lambda sample: sample["agreement"].argmax()
    return {name: np.array([rule(sample) for sample in samples]) for name, rule in rules.items()}


def usable_weights(weights, samples, warnings):
    """`weights`, or None if only the scorer's score counts. If samples have no likelihoods, their weight becomes 0, and
    a line is added to `warnings`."""
    if weights and weights["likelihood"] and not all("likelihood" in sample for sample in samples):
        warnings.append("the choice also uses likelihoods, but the samples have none; choosing without them")
        weights = weights | {"likelihood": 0.0}
    return weights if weights and (weights["likelihood"] or weights["agreement"]) else None


def words(sentences):
    """The number of words of a summary, a list of sentences."""
    return sum(len(sentence.split()) for sentence in sentences)
