"""Loading and checking a model with its tokenizer, from a folder in `from_pretrained` form or from the hub."""

import functools
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import huggingface_hub
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from harness.endings import UserError
from harness.files import is_utf8
from harness.shapes import WHOLE, fault, is_number

HUB_TIMEOUT = 5  # seconds
# Held by the script that trains a generator in a folder.
GENERATOR_LOCK = "generator.lock"
# They overflow in float16.
T5_FAMILY = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
# The names of dropout probabilities in the configs of T5, the BERT family, the BART family and others.
DROPOUT_KEYS = (
    "dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout",
    "activation_dropout",
)  # fmt: skip
# Parts of the names of settings in a config that do not affect what a model in evaluation computes: names, versions and
# types, what only training uses, what saves memory, and what is returned besides.
NOT_COMPUTED = (
    "name_or_path", "architectures", "version", "dtype", "id2label", "label2id", "problem_type", "task_specific_params",
    "finetuning_task", "auto_map", "dropout", "layerdrop", "initializer", "init_std", "gradient_checkpointing",
    "chunk_size_feed_forward", "use_cache", "output_", "return_dict", "classifier", "attn_implementation",
)  # fmt: skip
# Of a tokenizer: names, what each call sets, and what affects only the way back to text.
NO_TOKENIZER_SETTINGS = (
    "name_or_path", "tokenizer_class", "tokenizer_file", "special_tokens_map_file", "auto_map", "backend", "is_local",
    "local_files_only", "trust_remote_code", "_commit_hash", "model_max_length", "padding_side", "truncation_side",
    "model_input_names", "clean_up_tokenization_spaces", "chat_template", "processor_class", "transformers_version",
)  # fmt: skip
# The names of models' embedding tables for absolute positions; relative positions have no limit.
POSITION_TABLES = ("position_embeddings", "embed_positions", "wpe")
# The start of what `git clone` leaves of a large file if git-lfs is not installed.
LFS_POINTER = b"version https://git-lfs.github.com"
NO_LIMIT = 10**6  # Lengths from here on, such as tokenizers' 1e30, mean that there is no limit.
TOKENS = (WHOLE[0], lambda value: is_number(value) and (value >= NO_LIMIT or WHOLE[1](value)))
JSON_FILES = ("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.json")
MODEL_FILES = (*JSON_FILES, "*.safetensors", "*.bin", "*.model")
# Besides, those that only some tokenizers have.
ALL_FILES = (*MODEL_FILES, "*.txt", "*.spm", "*.tokenizer", "*.codes", "vocab-*.json")


def load(name, kind, problem, advice, dtype=torch.float32, **settings):
    """(model, tokenizer) of `name`, a folder or a name on the hub. Runs no code from there, and prints only download
    bars.

    kind: an Auto class of transformers. dtype: of the weights, or a function from the model's config to it.
    settings: attributes to set in the config, if it has them.

    UserError "problem (reason); advice" if they cannot be loaded.
    """
    # The library warns of weights that are tied or left out on purpose, and the hub's client of each retry.
    logging.set_verbosity_error()  # `check_weights` reports what matters.
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        check_files(Path(name))
        options = {"trust_remote_code": False, "local_files_only": Path(name).is_dir() or not hub_answers()}
        config = AutoConfig.from_pretrained(name, **options)
        for key, value in settings.items():
            if hasattr(config, key):
                setattr(config, key, value)
        dtype = dtype if isinstance(dtype, torch.dtype) else dtype(config)
        model, loaded = kind.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **options)
        check_weights(model, loaded["missing_keys"], loaded["unexpected_keys"])
        check_relative_positions(config)
        tokenizer, embeddings = load_tokenizer(name, **options), model.get_input_embeddings().num_embeddings
        if wrong := fault(tokenizer.model_max_length, TOKENS, "its tokenizer's model_max_length"):
            raise ValueError(wrong)
        tokens = max([len(tokenizer), *(number + 1 for number in tokenizer.get_vocab().values())])
        if tokens > embeddings:  # A text with one of the rest would end the run.
            raise ValueError(f"its tokenizer has {tokens} tokens, more than the {embeddings} embeddings")
        return model, tokenizer
    except Exception as error:  # Damaged folders cause OSError, ValueError, KeyError, SafetensorError and more.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if _needs_sentencepiece(Path(name)):
            reason, advice = "its tokenizer needs the package sentencepiece", "install it: pip install sentencepiece"
        elif Path(name).is_file():
            reason, advice = "it is a file", "give its folder"
        elif (Path(name) / "tokenizer.json").is_file() and not (Path(name) / "tokenizer_config.json").is_file():
            reason += "; its tokenizer_config.json is missing"
        elif "tiktoken" in reason:  # The library tries it if sentencepiece cannot read a file.
            reason = "its tokenizer's .model file is not a sentencepiece model"
        raise UserError(f"{problem} ({reason}); {advice}") from None


def check_files(folder):
    """ValueError, naming the file, if a file of a model's folder is damaged or would be ignored, as the library does
    silently with some."""
    if (folder / "adapter_config.json").is_file():  # The library reads it only if the package peft is installed.
        raise ValueError("it has an adapter (adapter_config.json), which would not be applied; merge it into the model")
    for path in sorted(path for path in folder.glob("*") if path.is_file()):
        with open(path, "rb") as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            raise ValueError(f"{path.name} is only a Git LFS pointer; fetch the file with git lfs pull")
        if not start and path.suffix in (".model", ".safetensors", ".bin"):
            raise ValueError(f"{path.name} is empty")
    for path in sorted(path for pattern in JSON_FILES for path in folder.glob(pattern)):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            raise ValueError(f"{path.name} is not valid JSON") from None


def check_weights(model, missing, unexpected):
    """ValueError if weights of `model` are missing from its files (and so are random), or are not finite, or if the
    files have more layers than its config.

    missing, unexpected: names of weights. Missing poolers, which are unused here, and unexpected heads are allowed.
    """
    missing = sorted(name for name in missing if "pooler." not in name)
    if missing:
        raise ValueError(f"{len(missing)} of the model's weights are missing from its files, such as {missing[0]}")
    kinds = {_in_any_layer(name) for name, _ in model.named_parameters()}
    # In files of whole models, the encoder's weights have the model type as a prefix.
    layers = [name for name in unexpected if {_in_any_layer(name), _in_any_layer(name.partition(".")[2])} & kinds]
    if layers:
        raise ValueError(f"{len(layers)} weights in its files do not fit its config.json, such as {sorted(layers)[0]}")
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise ValueError(f"its weights {name} contain NaN or infinity")
    for name, buffer in model.named_buffers():  # Infinity is allowed: it may forbid a token.
        if buffer.isnan().any():
            raise ValueError(f"its weights {name} contain NaN")


def check_relative_positions(config):
    """ValueError if the buckets of relative positions, as T5 has them, do not fit the config's largest distance: half
    of a decoder's are for single distances, the others for ranges up to the largest."""
    most = getattr(config, "relative_attention_max_distance", None)
    least = getattr(config, "relative_attention_num_buckets", 0) // 2 + 1
    if most is not None and most < least:
        raise ValueError(f"the relative_attention_max_distance {most} in its config.json must be at least {least}")


def _in_any_layer(name):
    return re.sub(r"\.\d+\.", ".#.", name)


def refuse_to_replace(folder, restart=""):
    """UserError if `folder` contains files of a model, which must not be replaced unasked by a script that did not make
    them.

    restart: end of the message, with an alternative to choosing another folder.
    """
    _check_name(folder)
    if any(any(Path(folder).glob(pattern)) for pattern in (*JSON_FILES, "*.safetensors")):
        raise UserError(f"{folder} already contains a model; choose another --save_dir{restart}")


def files_of_model(folder):
    """The Paths of the config and the weights of the model saved in `folder`, or of where they would be."""
    weights = sorted(Path(folder).glob("model*.safetensors")) or [Path(folder) / "model.safetensors"]
    return (Path(folder) / "config.json", *weights)


def check_apart(folder, source):
    """UserError if the output `folder` is that of the model `source`, which would be overwritten."""
    _check_name(folder)
    if Path(folder).is_dir() and Path(source).is_dir() and Path(folder).samefile(source):
        raise UserError(f"--save_dir {folder} is the folder of the model to start from; choose another")


def _check_name(folder):
    if not is_utf8(Path(folder).absolute()):
        raise UserError(f"--save_dir {folder}: its full path is not UTF-8, which tokenizers need; choose another")


def _needs_sentencepiece(folder):
    """Whether a folder's tokenizer is only a sentencepiece model, and that package is not installed."""
    is_alone = any(folder.glob("*.model")) and not (folder / "tokenizer.json").is_file()
    return is_alone and importlib.util.find_spec("sentencepiece") is None


def load_tokenizer(name, **options):
    """The tokenizer of `name`. OSError if a folder has none: transformers would make one that knows no words."""
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise OSError(f"it has no tokenizer file ({', '.join(sorted(files))})")
    return tokenizer


def tokenizer_text(tokenizer):
    """Everything in a tokenizer that affects token ids, as text, except truncation length and padding, which each call
    sets."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    else:
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return json.dumps([parts, tokenizer.truncation_side])


def tokenizer_settings(tokenizer):
    """What else affects the token ids of a tokenizer without a tokenizer.json: its settings, such as lower case or a
    language, and the contents of its files, as text. None for others: in them `tokenizer_text` has it all."""
    if tokenizer.is_fast:
        return None
    paths = tokenizer.vocab_files_names.keys()
    settings = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if name not in NO_TOKENIZER_SETTINGS and name not in paths
    }
    files = {name: digest for name, value in vars(tokenizer).items() if (digest := _digest_of_file(name, value))}
    # Without text there are only the tokens that begin and end one: of a language, say.
    return json.dumps([settings, files, tokenizer("")["input_ids"]], sort_keys=True, default=str)


def _digest_of_file(name, value):
    """A digest of what a tokenizer's attribute holds of a file besides the vocabulary, or None if that is nothing."""
    if hasattr(value, "serialized_model_proto"):  # Of sentencepiece.
        return hashlib.sha256(value.serialized_model_proto()).hexdigest()
    return hashlib.sha256(repr(sorted(value.items())).encode()).hexdigest() if name == "bpe_ranks" else None


def computation(config):
    """The settings in a model's config that affect what it computes in evaluation, a dict of plain JSON values. Those
    of generation are not among them: they belong to the generation config."""
    of_generation = {name for name in GenerationConfig().to_dict() if not name.endswith("token_id")}

    def chosen(settings):
        names = [name for name in settings if not any(part in name for part in NOT_COMPUTED)]
        # Off and unset are left out, as what the library will add one day will be by default.
        names = [name for name in names if settings[name] is not None and settings[name] is not False]
        return {name: inner(settings[name]) for name in names if name not in of_generation}

    def inner(value):  # The encoder's config, say.
        return chosen(value) if isinstance(value, dict) and "model_type" in value else value

    return json.loads(json.dumps(chosen(config.to_diff_dict()), default=str, sort_keys=True))


@functools.cache
def hub_answers():
    """Whether the hub can be reached. Asked once per process: the library would retry each file for 40 s."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # The HTTP client, and so its errors, depend on the version of huggingface_hub.
        return False
    return True


def half_precision_name(half_precision, family):
    """`half_precision` for `choose_precision`, with "auto" resolved: bfloat16 for the T5 family, else float16.

    family: the config's model_type.
    """
    return {"auto": "bfloat16" if family in T5_FAMILY else "float16"}.get(half_precision, half_precision)


def half_precision_dtype(config, half_precision, precision):
    """The dtype in which a model runs, or None for single precision.

    config: the model's. half_precision: from the command line; "auto" (no type named) is bfloat16 for the T5 family.
    precision: the harness Precision that was chosen by it.
    """
    family_type = half_precision_name(half_precision, config.model_type)
    return torch.bfloat16 if family_type == "bfloat16" else precision.dtype


def most_tokens(module):
    """The number of positions of `module`, an encoder or a decoder; sys.maxsize if there is no limit."""
    most = sys.maxsize
    for name, table in module.named_modules():
        if isinstance(table, torch.nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            # BART's family counts from 2, RoBERTa's from the row after the padding's.
            first = getattr(table, "offset", 0) or (0 if table.padding_idx is None else table.padding_idx + 1)
            # Some tables have spare rows that the config does not count.
            own = getattr(getattr(module, "config", None), "max_position_embeddings", sys.maxsize)
            # ProphetNet's decoder looks one token further ahead.
            most = min(most, min(table.num_embeddings - first, own) - hasattr(module, "ngram_embeddings"))
    return most


def check_length(argument, length, special, most):
    """UserError unless `length` tokens leave room for at least one of the text, and do not exceed `most`.

    special: the number of tokens of an empty text. most: as from `most_tokens`.
    """
    if length <= special:
        raise UserError(f"{argument} {length} leaves no room for a text; this model needs {special + 1} tokens")
    if length > most:
        raise UserError(f"{argument} {length} is more than the {most} positions of this model")


def check_lengths(model, tokenizer, source_length, target_length):
    """`check_length` of --max_source_length and --max_target_length for a sequence-to-sequence `model`."""
    special = len(tokenizer("")["input_ids"])
    check_length("--max_source_length", source_length, special, most_tokens(model.get_encoder()))
    check_length("--max_target_length", target_length, special, most_tokens(model.get_decoder()))
