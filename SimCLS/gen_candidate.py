"""Stage 2 of 5: generate candidate summaries for the documents of a CSV file, for all three splits.

    python3 gen_candidate.py --generator_name models/t5_covid --dataset_name clean_covid.csv --num_cands 16
    python3 gen_candidate.py ... --search beam+sample --num_cands 8    # 8 of each: {generator}_16, for --cand_num 16
    torchrun --nproc_per_node=2 gen_candidate.py ...    # splits the documents between processes; the files are the same

Writes {output_dir}/{generator}_{num_cands}/{split}.source, .target and .out, and the same three with .tokenized (Penn
Treebank tokens), with one text per line. The candidates of a document are on consecutive lines, best first; of several
searches, those of the first search come first, and the folder's name has the total number. For each line of `.out`,
{split}.likelihood has the sum of the log-probabilities of the candidate's tokens by the generator alone, without
penalties, and the number of tokens. If it is killed, the same command resumes and ends with the same files. Candidates
that were made otherwise are never replaced. provenance.json says what made them.

The default is diverse beam search with as many groups as candidates, as in SimCLS (Liu and Liu 2021).
"""

import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from harness import arguments, devices, endings, torchvision_compat  # noqa: F401  # isort: skip (before transformers)

from utils import progress

from harness.distributed import world as join_world
from harness.files import output_lock
from harness.precision import add_half_precision, choose_precision
from pretrained.model_folders import tokenizer_settings, tokenizer_text
from search.generator import (
    add_search_arguments,
    candidate_generator,
    candidates_a_document,
    check_search,
    length_batches,
)
from texts import provenance
from texts.candidate_files import CandidateFiles
from texts.documents import add_dataset_arguments, read_splits, safe_name


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    parser.add_argument("--generator_name", required=True, help="folder, or name on the hub")
    add_dataset_arguments(parser, percent="share of each split")
    parser.add_argument("--output_dir", type=Path, default=Path("candidates"), help="parent of the new folder")
    devices.add_arguments(parser)
    add_half_precision(parser, "float16 when no type is named; on a CPU, and for the T5 family, which overflows in "
                       "float16, bfloat16", unnamed="auto")  # fmt: skip
    add_search_arguments(parser)
    return parser


def main():
    args = get_args_parser().parse_args()
    check_search(args)
    path, documents, splits = read_splits(args)
    with join_world(devices.choose(args)) as world:
        precision = choose_precision(args.half_precision, world.device, say=world.say)
        with world.first_on_machine():
            generator = candidate_generator(args, world, precision)
        folder = args.output_dir / f"{safe_name(args.generator_name)}_{candidates_a_document(args)}"
        lock = output_lock(folder.with_name(folder.name + ".lock")) if world.is_main else contextlib.nullcontext()
        with lock:
            files = {split: candidate_files(generator, folder, split, part, world) for split, part in splits.items()}
            with world.main_first():  # If the main process raises, all processes end.
                if world.is_main:
                    folder.mkdir(exist_ok=True, parents=True)
                    for each in files.values():
                        each.prepare()
                    provenance.write(folder, generator.origin(args.generator_name, path, documents))
            for split, part in splits.items():
                generate_split(generator, files[split], split, part, args.cand_gen_batch, world)
        world.say(f"written: {folder}")


def candidate_files(generator, folder, split, documents, world):
    settings = generator.settings | {
        "generator": generator.fingerprint,
        "config": generator.config_digest,
        "tokenizer": provenance.digest(tokenizer_text(generator.tokenizer)),
        "documents": hashlib.sha256(json.dumps(documents).encode()).hexdigest(),
        "max_source_length": generator.max_source_length,
    }
    more = tokenizer_settings(generator.tokenizer)
    if more is not None:
        settings["tokenizer_settings"] = provenance.digest(more)
    return CandidateFiles(folder, split, settings, world)


def generate_split(generator, files, split, documents, batch_size, world):
    """Complete the candidate files of one split; every process of `world` makes its share of the batches."""
    if files.complete():
        world.say(f"{split}: the candidates of {len(documents)} documents already exist")
        return
    sources = generator.tokenize([document.text for document in documents])
    finished = files.finished()
    world.barrier()  # All processes must have read what is finished before any of them adds to it.
    if finished:
        world.say(f"{split}: resuming after {len(finished)} of {len(documents)} documents")
    started, batches = time.perf_counter(), unfinished_batches(sources, batch_size, finished)
    share = batches[world.rank :: world.size]
    with files.open() as file:
        for places in progress(share, len(share), f"{split} batches") if world.is_main else share:
            candidates = generator.generate([sources[place] for place in places])
            files.add(file, places, [documents[place] for place in places], candidates)
    world.barrier()
    count = sum(map(len, batches))
    world.say(f"{split}: {count} documents, {count / (time.perf_counter() - started):.2f} documents/s")
    if world.is_main:
        files.publish(documents)


def unfinished_batches(sources, size, finished):
    """The `length_batches` without the places in the set `finished`.

    A resumed run filters the batches of the whole split, so that, unless `size` has changed, sums are rounded as in an
    uninterrupted run.
    """
    batches = [[place for place in batch if place not in finished] for batch in length_batches(sources, size)]
    return [batch for batch in batches if batch]


if __name__ == "__main__":
    endings.run(main)
