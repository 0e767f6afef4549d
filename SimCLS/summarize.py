#!/usr/bin/env python3
"""Summarise your own texts: a generator writes candidates, and a scorer chooses the best. No references are needed.

    echo "some text" | python3 summarize.py --generator_name demo
    python3 summarize.py texts.txt --generator_name models/t5_covid --scorer_path cache/run/scorer.bin >summaries.txt
    python3 summarize.py papers.csv --doc_col_name abstract --generator_name models/t5_covid --all >candidates.jsonl

The input is a file with one document per line, `-` (standard input), or a column of a .csv or .csv.gz file. The output
is one summary per line, in the order of the documents, empty for an empty document. With --all it is one JSON object
per line with all candidates, each with its score, its log-probability and number of tokens by the generator, and its
Bayes risk. Documents are processed a few hundred at a time, so memory use does not grow with their number.

The summary is the candidate with the highest score, which combines the scorer's score, the generator's likelihood and
the agreement with the other candidates, with weights fitted in training. Without a scorer it is the candidate with the
lowest Bayes risk, that is, the one most similar to the others by ROUGE.
"""

import itertools
import json
import re
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from model import read_description
from utils import STANDARD_INPUT, read_lines

from harness import arguments, devices, distributed, endings
from harness.endings import UserError
from harness.job import refuse_job
from harness.precision import add_half_precision, choose_precision
from scorer.choices import add_judge_arguments, check_scorer_path, load_judge, score_candidates
from scorer.combination import combine, fitted_to
from search.generator import add_search_arguments, candidate_generator, check_search
from texts import provenance
from texts.documents import clean, read_columns
from texts.rouge_scores import add_rouge_argument, agreement, check_references
from texts.samples import split_lower
from texts.sentences import SentenceSplitter, ptb_tokenize

DOCUMENT_COLUMN = "abstract"
NOT_TEXT = (".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx", ".docx", ".pdf")
LONGEST_NAME = 2  # Words of a column's name.
BATCHES_AT_ONCE = 16  # Batches whose documents are sorted by length together.


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    add = parser.add_argument
    add("text", nargs="?", default="-", help="text file, CSV file, or - for standard input")
    add("--doc_col_name", help=f"column of a CSV file; by default {DOCUMENT_COLUMN}")
    add("--generator_name", required=True, help="folder, or name on the hub")
    add_judge_arguments(parser)
    add_half_precision(parser, "generate and score in it", unnamed="auto")
    add("--all", action="store_true", help="JSON lines with every candidate")
    add_rouge_argument(parser)
    devices.add_arguments(parser)
    add_search_arguments(parser)
    return parser


def main():
    args = get_args_parser().parse_args()
    refuse_job()
    check_search(args)
    check_scorer_path(args)
    documents = map(clean, read_documents(args.text, args.doc_col_name or DOCUMENT_COLUMN))
    first = next(documents, None)
    if first is None:
        raise UserError(f"{args.text} is empty; it needs one document per line")
    if args.doc_col_name and not is_table(args.text):
        raise UserError(
            f"--doc_col_name goes with a .csv file, which {args.text} is not; leave it out, or rename the file"
        )
    with distributed.world(devices.choose(args)) as world:
        summarizer = Summarizer(args, world)
        documents = itertools.chain([first], documents)
        while some := list(itertools.islice(documents, BATCHES_AT_ONCE * args.cand_gen_batch)):
            for found in summarizer(some):
                print(json.dumps(found, allow_nan=False) if args.all else found["summary"])
            sys.stdout.flush()


def is_table(name):
    return name.lower().endswith((".csv", ".csv.gz"))


def read_documents(name, column):
    """Yield the documents of the file `name`, or of standard input. UserError for a table that is not a .csv file."""
    if is_table(name):
        # A repeated header is a document like any other: each row has its line of output.
        yield from (text for (text,) in read_columns(Path(name), column))
        return
    if name.lower().endswith(NOT_TEXT):
        raise UserError(
            f"{name} is neither plain text, one document per line, nor a .csv file; save it as one of these"
        )
    lines = read_lines(STANDARD_INPUT if name == "-" else name)
    first = next(lines, None)
    if first is None:
        return
    fields = [field.strip(" \"'") for field in re.split("[,;\t|]", first)]
    # A sentence may have the column's name between two commas.
    if column in fields and max(len(field.split()) for field in fields) <= LONGEST_NAME:
        raise UserError(
            f"{name}: its first line is a table header with the column {column!r}; save it as a .csv file with commas"
        )
    yield first
    yield from lines


def tell(line):
    print(line, file=sys.stderr, flush=True)  # Standard output is for summaries.


class Summarizer:
    """Generates and ranks candidates for documents. args: of this script."""

    def __init__(self, args, world):
        self.args, self.world = args, world
        precision = choose_precision(args.half_precision, world.device, say=tell)
        self.generator = candidate_generator(args, world, precision)
        self.split = SentenceSplitter(None).split  # A stream cannot be read in advance for learning.
        self.judge = self.weights = None
        self.say = tell
        if args.scorer_path:
            self.judge = load_judge(args, world, say=lambda line: None)
            warnings = []
            self.weights = fitted_to(args.scorer_path, warnings)
            made = {"candidates": self.generator.how()}
            trained = read_description(args.scorer_path) or {}
            for line in warnings + provenance.check_belonging(made, trained, args.rouge_tokens):
                tell(f"warning: {line}")

    def __call__(self, documents):
        """A dict for each of the documents (list of str): "summary", and "candidates", a list of dicts, best first."""
        places = [place for place, text in enumerate(documents) if text]
        found = [{"summary": "", "candidates": []} for _ in documents]
        if not places:
            return found
        texts = [documents[place] for place in places]
        candidates = self.generator.candidates(texts, self.args.cand_gen_batch)
        if not self.judge:
            self.check_tokens(candidates)
        alike = map(self.agreement, candidates)
        scores = self.scores(texts, candidates) if self.judge else [None] * len(texts)
        for place, *of_document in zip(places, candidates, alike, scores, strict=True):
            found[place] = self.described(*of_document)
        return found

    def check_tokens(self, candidates):
        """UserError if ROUGE, which alone chooses without a scorer, sees little of the candidates' letters."""
        texts = [candidate.text for some in candidates for candidate in some if any(map(str.isalpha, candidate.text))]
        say, self.say = self.say, lambda line: None  # Once is enough.
        check_references(texts, self.args.rouge_tokens, "the candidates", say)

    def agreement(self, candidates):
        """The agreement of each of a document's Candidates with the others, float64 [candidates]; None if unused."""
        if self.judge and not self.args.all and not (self.weights and self.weights["agreement"]):
            return None
        tokenized = [split_lower(ptb_tokenize(candidate.text), self.split) for candidate in candidates]
        return agreement(tokenized, self.args.rouge_tokens)

    def scores(self, documents, candidates):
        """The scorer's scores of each document's Candidates: a list of float64 [candidates]."""
        samples = [
            {
                "article_untok": [document],
                "abstract_untok": [""],
                "candidates": [[[candidate.text], 0.0] for candidate in some],
                "candidates_untok": [[[candidate.text], 0.0] for candidate in some],
            }
            for document, some in zip(documents, candidates, strict=True)
        ]
        judge, batch_size = self.judge, self.args.cand_gen_batch
        return score_candidates(judge.scorer, judge.encoding, samples, batch_size, self.world.device, judge.precision)

    def described(self, candidates, alike, scores):
        """The dict of one document. candidates: list of Candidate. alike: from `agreement`. scores: from `scores`; None
        without a scorer."""
        if self.weights:
            likelihood = [[candidate.log_prob, candidate.tokens] for candidate in candidates]
            scores = combine(scores, likelihood, alike, self.weights)
        risks = [None] * len(candidates) if alike is None else (1 - alike).tolist()
        order = risks if scores is None else -scores
        rows = [
            {
                **candidate._asdict(),
                "score": None if scores is None else float(scores[place]),
                "bayes_risk": risks[place],
            }
            for place, candidate in enumerate(candidates)
        ]
        ranked = [rows[place] for place in sorted(range(len(rows)), key=lambda place: order[place])]
        return {"summary": ranked[0]["text"], "candidates": ranked}


if __name__ == "__main__":
    endings.run(main)
