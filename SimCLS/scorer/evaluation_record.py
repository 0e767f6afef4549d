"""The record of an evaluation: what it was made of, so that it does not replace one of something else."""

import json
from pathlib import Path

from harness.endings import UserError
from harness.resume import changes
from pretrained import minilm
from pretrained.model_folders import ALL_FILES, MODEL_FILES
from texts import provenance
from texts.documents import find_dataset
from texts.samples import sample_files

EXPERIMENT = "simcls_evaluation"
# Keys of a record besides its arguments -> what differs from another record that has another value.
USED = {
    "places": "other folders with the same names",
    "precision": "another precision",
    "scorer_digest": "other scorer weights",
    "input_digest": "other contents of the input files",
    "models_digest": "another scorer.json, encoder, or tokenizer of the generator",
}
NEWER = "models_digest"


def digest_of_input(args):
    """A digest of the input files that the arguments name: samples, text files, or documents and the generator."""
    files = sample_files(args.samples) if args.samples else [args.summaries, args.references, args.sources]
    if args.generator_name and not args.samples:
        generator = Path(args.generator_name)  # For a name on the hub, there are no files; the name itself is recorded.
        files = [
            find_dataset(args.dataset_name),
            *(path for name in MODEL_FILES for path in sorted(generator.glob(name))),
        ]
    # No pipes, which can be read only once. Missing files are reported later.
    return provenance.digest_files(path for path in files if path and path.is_file())


def digest_of_models(args, encoder):
    """A digest of what `digest_of_input` and the scorer's own file leave out: the scorer's description, which has its
    weights of the choice, its encoder, and files of the generator.

    encoder: a folder, or a name, as for `model.load_encoder`.
    """
    folders = [Path(args.generator_name)] if args.generator_name else []
    folders.append(Path(minilm.resolve(encoder)))
    files = [path for folder in folders for name in ALL_FILES for path in sorted(folder.glob(name))]
    described = args.scorer_path.with_name("scorer.json")
    return provenance.digest_files(path for path in (described, *files) if path.is_file())


def refuse_to_replace(output, arguments, used):
    """UserError if the file `output` exists and is not the record of an evaluation with these arguments and `used`.

    NEWER is not compared with a record that lacks it.
    """
    if not output.exists():
        return
    try:
        record = json.loads(output.read_bytes())
        ours = record["experiment"] == EXPERIMENT
        was = changes({name: record["arguments"].get(name) for name in arguments}, arguments)
        known = {NEWER: used.get(NEWER)} | record
        was = was or ", ".join(text for key, text in USED.items() if known.get(key) != used.get(key))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        ours = False
    if not ours or was:
        what = f"from an evaluation with {was}" if ours else "not an evaluation"
        raise UserError(f"{output} already exists and is {what}; choose another --output, or delete it")
