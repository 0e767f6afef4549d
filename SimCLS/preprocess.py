"""Stage 3 of 5: candidate text files to scored samples, one JSON file a document: the training data of SimCLS.

    python3 preprocess.py --src_dir candidates/t5-small_16 --tgt_dir samples/train --split train --num_cands 16

Reads `{split}.source`, `{split}.target` and `{split}.out`, each with its `.tokenized` version, from --src_dir: one
sample a line, the --num_cands candidates of a document on neighbouring lines of `.out`. Writes
`{tgt_dir}/{i}.json` for document i with the keys of the samples published with SimCLS and BRIO:

    article_untok, abstract_untok       lists of sentences
    candidates_untok                    [[sentences, score], ...] in the order of generation
    article, abstract, candidates       the same of the tokenized, lower-cased text
    likelihood                          [[log-probability, tokens], ...], where there is `{split}.likelihood`

score: mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-Lsum, stemmed, of the tokenized candidate and abstract. Sentences
are split by what Punkt learns from the split's own documents, unless NLTK's English data is installed.

When it ends, the folder holds the samples of this input and no others: those of an earlier run are replaced, files
of other names are left alone. Until then the new samples lie in `{tgt_dir}/.unfinished` and the old ones stay as they
were. A killed run leaves that folder; the same command starts again and ends with the same files. One sync flushes
all samples before they get their names: a sync a sample would take longer than the scoring.

(The original appends a folder named after the split to --tgt_dir. Here --tgt_dir is the folder of the samples.)
"""

import itertools
import json
import os
import re
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from utils import map_in_order, progress, read_lines

from harness import arguments, endings, machine
from harness.files import staging
from texts.candidate_files import check_counts, likelihood_file, read_likelihoods, read_split, text_files
from texts.samples import score_sample
from texts.scoring import add_rouge_argument, check_references
from texts.sentences import SentenceSplitter

# Documents that a worker process takes at a time: about 50 ms of work.
CHUNK = 16


def get_args_parser():
    parser = arguments.OneLineParser(description=arguments.first_line(__doc__))
    parser.add_argument("--src_dir", type=Path, required=True, help="folder of the candidate text files")
    parser.add_argument("--tgt_dir", type=Path, required=True, help="folder for the samples of this split")
    parser.add_argument("--split", choices=("train", "val", "test"), required=True)
    parser.add_argument(
        "--num_cands",
        "--cand_num",
        dest="cand_num",
        type=arguments.positive_int,
        default=16,
        help="candidates a document",
    )
    parser.add_argument(
        "--num_workers",
        "--workers",
        dest="workers",
        type=arguments.positive_int,
        default=machine.usable_cores(),
        help="processes that score; by default one for each usable core",
    )
    add_rouge_argument(parser)
    return parser


def main():
    args = get_args_parser().parse_args()
    plain, tokenized = text_files(args.src_dir, args.split)
    likelihood = likelihood_file(args.src_dir, args.split)
    documents = check_counts(plain, tokenized, likelihood, args.cand_num)
    check_references(read_lines(plain.target), args.rouge_tokens, plain.target)
    splitter = SentenceSplitter(read_lines(plain.source))
    with staging(args.tgt_dir) as stage:
        jobs = zip(
            itertools.count(),
            read_split(plain, args.cand_num),
            read_split(tokenized, args.cand_num),
            read_likelihoods(likelihood, args.cand_num),
        )
        kept = splitter, stage, args.rouge_tokens
        written = map_in_order(write_sample, jobs, args.workers, CHUNK, set_up_worker, kept)
        for _ in progress(written, documents, f"{args.split} samples"):
            pass
        replaced = publish_samples(stage, args.tgt_dir, documents)
    print(f"{args.tgt_dir}: {documents} samples with {args.cand_num} candidates each, in place of {replaced} before")


def publish_samples(stage, tgt_dir, documents):
    """Replace the samples of `tgt_dir` by those in `stage`; return how many there were before."""
    os.sync()
    old = [path for path in tgt_dir.iterdir() if re.fullmatch(r"[0-9]+\.json", path.name)]
    # First all old ones go: a kill in here may leave too few samples, but never old and new ones side by side.
    for path in old:
        path.unlink()
    for index in range(documents):
        os.rename(stage / f"{index}.json", tgt_dir / f"{index}.json")
    return len(old)


# What a worker process keeps between its documents.
_worker = {}


def set_up_worker(splitter, stage, tokens):
    _worker.update(splitter=splitter, stage=stage, tokens=tokens)


def write_sample(job):
    """Write one sample. job: (index, the document's Lines, its tokenized Lines, its likelihoods or None)."""
    index, plain, tokenized, likelihood = job
    path = _worker["stage"] / f"{index}.json"
    sample, _ = score_sample(plain, tokenized, _worker["splitter"].split, _worker["tokens"], likelihood)
    try:
        path.write_text(json.dumps(sample) + "\n", encoding="ascii")
    except OSError as error:
        error.filename = str(path)
        raise


if __name__ == "__main__":
    endings.run(main)
