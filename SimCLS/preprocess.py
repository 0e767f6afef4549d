"""Stage 3 of 5: turn candidate text files into scored samples, one JSON file per document: SimCLS's training data.

    python3 preprocess.py --src_dir candidates/t5-small_16 --tgt_dir samples/train --split train --num_cands 16

Reads `{split}.source`, `{split}.target` and `{split}.out`, each with its `.tokenized` version, from --src_dir: one text
per line, the --num_cands candidates of a document on consecutive lines of `.out`. Writes `{tgt_dir}/{i}.json` for
document i with the keys of the samples published with SimCLS and BRIO:

    article_untok, abstract_untok       lists of sentences
    candidates_untok                    [[sentences, score], ...] in the order of generation
    article, abstract, candidates       the same for the tokenized, lower-cased text
    likelihood                          [[log-probability, tokens], ...], if there is a `{split}.likelihood`

score: the mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-Lsum, with stemming, of the tokenized candidate and abstract.
Sentences are split by NLTK's English data if installed, else by what Punkt learns from the split's own documents.

In the end, --tgt_dir contains the samples of this input and provenance.json, which says what they were made from; files
with other names are left alone. Samples of another input are never replaced. Until then the new samples are in
`{tgt_dir}/.unfinished`. A killed run leaves that folder; the same command starts over and ends with the same files. All
samples are flushed by a single sync before they are renamed: one sync per sample would take longer than the scoring.

(The original appends a folder named after the split to --tgt_dir. Here --tgt_dir is the folder of the samples.)
"""

import itertools
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from utils import map_in_order, progress, read_lines

from harness import arguments, endings, machine
from harness.endings import UserError
from harness.files import staging
from texts import provenance
from texts.candidate_files import check_counts, edited_files, likelihood_file, read_likelihoods, read_split, text_files
from texts.rouge_scores import add_rouge_argument, check_references
from texts.samples import FILE_NAME, score_sample
from texts.sentences import SentenceSplitter

# Documents per task of a worker process: about 50 ms of work.
CHUNK = 16


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    parser.add_argument("--src_dir", type=Path, required=True, help="folder of the candidate text files")
    parser.add_argument("--tgt_dir", type=Path, required=True, help="folder for the samples of this split")
    parser.add_argument("--split", choices=("train", "val", "test"), required=True)
    parser.add_argument("--num_cands", "--cand_num", dest="cand_num", type=arguments.positive_int, default=16,
                        help="candidates per document")  # fmt: skip
    parser.add_argument("--num_workers", "--workers", dest="workers", type=arguments.positive_int,
                        default=machine.usable_cores(),
                        help="scoring processes; by default one per usable core")  # fmt: skip
    add_rouge_argument(parser)
    return parser


def main():
    args = get_args_parser().parse_args()
    if args.src_dir.is_dir() and args.tgt_dir.is_dir() and args.src_dir.samefile(args.tgt_dir):
        raise UserError(
            f"--tgt_dir {args.tgt_dir} is also the --src_dir, and {provenance.FILE} would be lost; choose another"
        )
    plain, tokenized = text_files(args.src_dir, args.split)
    likelihood = likelihood_file(args.src_dir, args.split)
    documents = check_counts(plain, tokenized, likelihood, args.cand_num)
    check_references(read_lines(plain.target), args.rouge_tokens, plain.target)
    edited = edited_files(args.src_dir, args.split)
    if edited:
        told = f"{args.src_dir}: {', '.join(edited)} changed since gen_candidate.py wrote them"
        print(f"warning: {told}; texts, tokenized texts and likelihoods must still match", file=sys.stderr)
    splitter = SentenceSplitter(read_lines(plain.source))
    made_of = provenance.describe(
        files=provenance.digest_files(path for path in (*plain, *tokenized, likelihood) if path),
        split=args.split,
        cand_num=args.cand_num,
        rouge_tokens=args.rouge_tokens,
        sentences=splitter.kind,
        candidates=provenance.read(args.src_dir),
        documents=documents,
        **({"edited": edited} if edited else {}),
    )
    with staging(args.tgt_dir) as stage:
        refuse_to_replace(args.tgt_dir, made_of)
        jobs = zip(
            itertools.count(),
            read_split(plain, args.cand_num),
            read_split(tokenized, args.cand_num),
            read_likelihoods(likelihood, args.cand_num),
        )
        _worker.update(splitter=splitter, stage=stage, tokens=args.rouge_tokens)
        written = map_in_order(write_sample, jobs, args.workers, CHUNK)
        for _ in progress(written, documents, f"{args.split} samples"):
            pass
        provenance.write(args.tgt_dir, made_of)
        publish_samples(stage, args.tgt_dir, documents)
    print(f"{args.tgt_dir}: {documents} samples with {args.cand_num} candidates each")


def own_samples(folder):
    return [path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name)]


def refuse_to_replace(folder, made_of):
    """UserError if `folder` has samples whose provenance is not `made_of`."""
    found = provenance.read(folder)
    if own_samples(folder) and (found is None or found["digest"] != made_of["digest"]):
        other = provenance.differences(made_of, found)
        settings = f"other settings ({other})" if other else "unknown settings"
        raise UserError(f"{folder} has samples made with {settings}; choose another --tgt_dir, or delete that folder")


def publish_samples(stage, tgt_dir, documents):
    """Replace the samples of `tgt_dir` with those in `stage`."""
    os.sync()
    # Delete all old samples first: a kill in here may leave too few samples, but never a mixture of old and new.
    for path in own_samples(tgt_dir):
        path.unlink()
    # 0.json comes last: if it exists, all samples do.
    for index in reversed(range(documents)):
        os.rename(stage / f"{index}.json", tgt_dir / f"{index}.json")


# State from `main` that the worker processes inherit by fork.
_worker = {}


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
