"""The throughput (documents/s) of evaluate_model.py relative to the original's evaluation, one by one and in batches.

    python3 benchmarks/evaluation.py --data pubmed_abstracts.csv.gz --generator_name models/t5_pubmed \\
        --scorer_path cache/run/scorer.bin --reference_python /path/of/venv/bin/python

`plain` reimplements the original's evaluation: for each test document, padded to 512 tokens, the generator searches
once for its own summary and again for the candidates to choose from (both times with 16 groups of one beam; with
transformers 4.56.2 if --reference_python has it). Each time, the scorer encodes the document and the reference, padded
to 512 tokens, and what was generated. ROUGE comes from rouge-score. `batched` is what a skilled user would make of it:
documents sorted by length, REFERENCE_BATCH at a time, one search for both purposes, padding only to the longest of the
batch. One-off work, such as loading the models and computing intervals, is timed for no side. Before the timing, all
sides must choose the same candidates, with the same ROUGE.
"""

import argparse
import functools
import operator
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import CPU, ROOT, Reference, check, finish, get_parser, interleaved, new_record, ratio_summary

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import numpy as np
import torch
from candidate_sides import NEEDS, run_reference
from candidates_reference import DIVERSITY_PENALTY
from model import load_scorer
from rouge_score.rouge_scorer import RougeScorer

from harness import arguments, endings
from harness.precision import choose_precision
from scorer.choices import by_scorer, score_candidates
from search.generator import CandidateGenerator, generate_samples, length_batches, load_generator, search_settings
from texts.documents import clean, find_dataset, read_documents, split_documents
from texts.samples import as_sample
from texts.sentences import SentenceSplitter

CANDIDATES = 16
LONGEST = 512
BATCH = 16  # evaluate_model.py's default for both of its models.
REFERENCE_BATCH = 4  # The fastest for transformers on a CPU.
TARGETS = {"cpu": {"plain": ("at least", 5.0)}}


def get_args_parser():
    parser = get_parser(__doc__, "evaluation", rounds=6)
    parser.add_argument("--data", default="sample", help="CSV file or data set name")
    parser.add_argument("--generator_name", default=str(ROOT / "SimCLS" / "demo"), help="folder")
    parser.add_argument("--scorer_path", type=Path, help="trained scorer; by default the generator's encoder as it is")
    parser.add_argument("--documents", type=arguments.positive_int, default=32, help="documents to evaluate")
    parser.add_argument("--reference_python", default=sys.executable, help="interpreter that has transformers 4.56.2")
    return parser


def main():
    args = get_args_parser().parse_args()
    documents = split_documents(read_documents(find_dataset(args.data)))["test"][: args.documents]
    model, tokenizer = load_generator(args.generator_name, torch.float32)
    wanted = {"num_cands": CANDIDATES, "num_groups": CANDIDATES, "diversity_penalty": DIVERSITY_PENALTY}
    settings = search_settings(argparse.Namespace(**wanted, decoder_max_len=None), model.generation_config)
    generator = CandidateGenerator(model, tokenizer, settings)
    scorer, encoding, _ = load_scorer(None if args.scorer_path else args.generator_name, args.scorer_path)
    with Reference(args.reference_python, "candidates_reference.py", needs=NEEDS) as reference:
        print(f"reference: {reference.name}; {torch.get_num_threads()} threads", flush=True)
        other = args.generator_name, generator, scorer, encoding, reference
        arms = {
            "plain": functools.partial(Plain(*other), documents),
            "batched": functools.partial(Batched(*other), documents),
            "ours": functools.partial(ours, generator, scorer, encoding, documents),
        }
        found = {name: run()[1] for name, run in arms.items()}
        for name in ("plain", "batched"):
            check_equal(found[name], found["ours"])
        seconds = interleaved({name: lambda run=run: run()[0] for name, run in arms.items()}, args.rounds)
    record = new_record(
        "evaluation",
        CPU,
        reference=reference.name,
        documents=len(documents),
        candidates=CANDIDATES,
        seconds=seconds,
        documents_per_second={name: len(documents) / median(each) for name, each in seconds.items()},
        ratios={name: ratio_summary(seconds[name], seconds["ours"]) for name in ("plain", "batched")},
    )
    finish(record, args)


def ours(generator, scorer, encoding, documents):
    """(seconds, {"summaries": list of str, "generator" and "SimCLS": ROUGE, each float64 [documents, 3]})"""
    started = time.perf_counter()
    samples = generate_samples(generator, documents, BATCH)
    scores = score_candidates(scorer, encoding, samples, BATCH, CPU, choose_precision(None, CPU))
    choices = by_scorer(scores, samples)
    seconds = time.perf_counter() - started
    chosen = list(zip(samples, choices, strict=True))
    rouge = {"SimCLS": [sample["rouge"][choice] for sample, choice in chosen]}
    rouge["generator"] = [sample["rouge"][0] for sample in samples]
    summaries = [text_of(sample, choice) for sample, choice in chosen]
    return seconds, {"summaries": summaries} | {name: np.array(each) for name, each in rouge.items()}


def text_of(sample, choice):
    return " ".join(sample["candidates_untok"][choice][0])


class Plain:
    """The original's evaluation, one document at a time. A call returns the same as `ours`."""

    def __init__(self, model_folder, generator, scorer, encoding, reference):
        self.generator, self.scorer, self.encoding, self.reference = generator, scorer, encoding, reference
        length = generator.settings["max_length"]
        self.request = {"model": str(model_folder), "num_cands": CANDIDATES, "max_length": length, "pad_to": LONGEST}
        self.rouge = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)

    @torch.no_grad()
    def __call__(self, documents):
        sources = [ids.tolist() for ids in self.generator.tokenize([document.text for document in documents])]
        generating, tokens = self.generate(sources)
        self.scorer.eval()
        started = time.perf_counter()
        split = SentenceSplitter(document.text for document in documents).split
        decode = functools.partial(self.generator.tokenizer.batch_decode, skip_special_tokens=True)
        texts = [[clean(text) for text in decode(candidates)] for candidates in tokens]
        found = {"summaries": [], "generator": [], "SimCLS": []}
        for document, some, choice in zip(documents, texts, self.choose(documents, texts), strict=True):
            sample = as_sample(document.text, document.summary, some, split)
            found["summaries"].append(text_of(sample, choice))
            found["generator"].append(self.score(sample, 0))
            found["SimCLS"].append(self.score(sample, choice))
        seconds = generating + time.perf_counter() - started
        return seconds, found | {name: np.array(found[name]) for name in ("generator", "SimCLS")}

    def generate(self, sources):
        """(seconds, the token ids of each document's candidates)"""
        one_by_one = [[place] for place in range(len(sources))]
        searches = ("the generator's own", "to choose from")
        pad = self.generator.pad_token
        runs = [run_reference(self.reference, sources, one_by_one, self.request, pad) for _ in searches]
        return sum(seconds for seconds, _ in runs), runs[-1][1]

    def choose(self, documents, texts):
        """Yield, for each document, the index of the candidate that the scorer chooses."""
        for document, some in zip(documents, texts, strict=True):
            self.similarities(document, some[:1])
            yield int(self.similarities(document, some).argmax())

    def similarities(self, document, texts):
        """The cosine similarity of each text's state and the document's.

        Like the original, it also computes the reference's, which is not used.
        """
        state = self.states(self.encoding.documents([document.text]), LONGEST)
        reference = self.states(self.encoding.summaries([document.summary]), LONGEST)
        candidates = self.encoding.summaries(texts)
        torch.cosine_similarity(reference, state)
        return torch.cosine_similarity(self.states(candidates, max(map(len, candidates))), state)

    def states(self, rows, length):
        ids = torch.tensor([row + [self.encoding.pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return self.scorer.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]

    def score(self, sample, place):
        reference, candidate = "\n".join(sample["abstract"]), "\n".join(sample["candidates"][place][0])
        return [score.fmeasure for score in self.rouge.score(reference, candidate).values()]


class Batched(Plain):
    """The same in batches of documents of similar length, without repeated work and unnecessary padding."""

    def generate(self, sources):
        batches = length_batches(sources, REFERENCE_BATCH)
        request = self.request | {"pad_to": None}
        return run_reference(self.reference, sources, batches, request, self.generator.pad_token)

    def choose(self, documents, texts):
        sources = self.encoding.documents([document.text for document in documents])
        chosen = [None] * len(documents)
        for places in length_batches(sources, REFERENCE_BATCH):
            rows = [sources[place] for place in places]
            own = self.states(rows, max(map(len, rows)))
            rows = self.encoding.summaries([text for place in places for text in texts[place]])
            candidates = self.states(rows, max(map(len, rows))).unflatten(0, (len(places), -1))
            best = torch.cosine_similarity(candidates, own[:, None], dim=-1).argmax(1).tolist()
            for place, choice in zip(places, best, strict=True):
                chosen[place] = choice
        return chosen


def check_equal(plain, ours):
    """Raise AssertionError unless both sides chose the same candidates, with the same ROUGE to 1e-12."""
    same = sum(map(operator.eq, plain["summaries"], ours["summaries"]))
    difference = max(np.abs(plain[name] - ours[name]).max() for name in ("generator", "SimCLS"))
    print(
        f"{same} of {len(ours['summaries'])} choices are the same; ROUGE differs by at most {difference:.1e}",
        flush=True,
    )
    check(same == len(ours["summaries"]) and difference <= 1e-12, "the two sides choose or score differently")


if __name__ == "__main__":
    endings.run(main)
