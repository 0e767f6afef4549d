"""Candidate text files to scored samples, one JSON file a document: the training data of SimCLS.

    python3 preprocess.py --src_dir candidates/t5-small_16 --tgt_dir samples/train --split train --cand_num 16

Reads `{split}.source`, `{split}.target` and `{split}.out`, each with its `.tokenized` version, from --src_dir: one
sample a line, the --cand_num candidates of a document on neighbouring lines of `.out`. Writes
`{tgt_dir}/{i}.json` for document i with the keys of the samples published with SimCLS and BRIO:

    article_untok, abstract_untok       lists of sentences
    candidates_untok                    [[sentences, score], ...] in the order of generation
    article, abstract, candidates       the same of the tokenized, lower-cased text

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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_rouge import RougeReference
from utils import SentenceSplitter, count_lines, map_in_order, progress, read_lines

from harness import arguments, endings, machine
from harness.endings import UserError
from harness.files import staging

# Documents that a worker process takes at a time: about 50 ms of work.
CHUNK = 16


class TextFiles(NamedTuple):
    """The three files of a split, as they are or tokenized."""

    source: Path
    target: Path
    out: Path


class Lines(NamedTuple):
    """One document's lines of those files; `candidates` is a list."""

    source: str
    target: str
    candidates: list


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--src_dir", type=Path, required=True, help="folder of the candidate text files")
    parser.add_argument("--tgt_dir", type=Path, required=True, help="folder for the samples of this split")
    parser.add_argument("--split", choices=("train", "val", "test"), required=True)
    parser.add_argument("--cand_num", type=arguments.positive_int, default=16, help="candidates a document")
    parser.add_argument(
        "--workers",
        type=arguments.positive_int,
        default=machine.usable_cores(),
        help="processes that score; by default one for each usable core",
    )
    return parser


def main():
    args = get_args_parser().parse_args()
    plain, tokenized = text_files(args.src_dir, args.split)
    documents = check_counts(plain, tokenized, args.cand_num)
    splitter = SentenceSplitter(read_lines(plain.source))
    with staging(args.tgt_dir) as stage:
        jobs = zip(
            itertools.count(),
            read_split(plain, args.cand_num),
            read_split(tokenized, args.cand_num),
        )
        written = map_in_order(write_sample, jobs, args.workers, CHUNK, set_up_worker, (splitter, stage))
        for _ in progress(written, documents, f"{args.split} samples"):
            pass
        replaced = publish_samples(stage, args.tgt_dir, documents)
    print(f"{args.tgt_dir}: {documents} samples with {args.cand_num} candidates each, in place of {replaced} before")


def text_files(src_dir, split):
    """The (plain, tokenized) TextFiles of a split. They need not exist."""
    plain = TextFiles(*(src_dir / f"{split}.{field}" for field in TextFiles._fields))
    return plain, TextFiles(*(path.with_name(path.name + ".tokenized") for path in plain))


def check_counts(plain, tokenized, cand_num):
    """The number of documents; UserError when a file cannot be read, or the line counts do not fit `cand_num`."""
    counts = {path: count_lines(path) for path in (*plain, *tokenized)}
    documents = counts[plain.source]
    if documents == 0:
        raise UserError(f"{plain.source} is empty; it needs one document a line")
    needed = dict.fromkeys(counts, documents)
    needed.update({plain.out: documents * cand_num, tokenized.out: documents * cand_num})
    wrong = [
        f"{path.name} has {count} lines, not {needed[path]}" for path, count in counts.items() if count != needed[path]
    ]
    if wrong:
        raise UserError(
            f"{plain.source.parent}: the files do not fit the {documents} lines of {plain.source.name} and "
            f"--cand_num {cand_num}: {', '.join(wrong)}; give the --cand_num of the generation, or generate again"
        )
    return documents


def read_split(files, cand_num):
    """Yield the Lines of each document. A missing or additional line is a ValueError: see `check_counts`."""
    candidates = zip(*[read_lines(files.out)] * cand_num, strict=True)
    for source, target, group in zip(read_lines(files.source), read_lines(files.target), candidates, strict=True):
        yield Lines(source, target, list(group))


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


def set_up_worker(splitter, stage):
    _worker.update(splitter=splitter, stage=stage)


def write_sample(job):
    """Write one sample. job: (index, the document's Lines, its tokenized Lines)."""
    index, plain, tokenized = job
    path = _worker["stage"] / f"{index}.json"
    text = json.dumps(build_sample(plain, tokenized, _worker["splitter"].split))
    try:
        path.write_text(text + "\n", encoding="ascii")
    except OSError as error:
        error.filename = str(path)
        raise


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


if __name__ == "__main__":
    endings.run(main)
