"""Loading a model with its tokenizer in `from_pretrained` form, a folder or a name on the hub."""

import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import huggingface_hub
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from harness.endings import UserError

HUB_TIMEOUT = 5  # seconds
# They overflow in float16.
T5_FAMILY = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


def load(name, kind, problem, advice, dtype=torch.float32, **settings):
    """(model, tokenizer) of `name`. No code of the model's is run, and nothing is printed but download bars.

    kind: an Auto class of transformers. dtype: of the weights, or a function from the model's config to one.
    settings: attributes of the config, set where it has them.

    UserError "problem (reason); advice" when they cannot be loaded.
    """
    # The library warns of weights that are tied, or left out on purpose, and the hub's client of each try.
    logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        options = {"trust_remote_code": False, "local_files_only": Path(name).is_dir() or not hub_answers()}
        config = AutoConfig.from_pretrained(name, **options)
        for key, value in settings.items():
            if hasattr(config, key):
                setattr(config, key, value)
        dtype = dtype if isinstance(dtype, torch.dtype) else dtype(config)
        model = kind.from_pretrained(name, config=config, dtype=dtype, **options)
        return model, load_tokenizer(name, **options)
    except Exception as error:  # Of damaged folders come OSError, ValueError, KeyError, SafetensorError and more.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{problem} ({reason}); {advice}") from None


def load_tokenizer(name, **options):
    """The tokenizer of `name`. OSError when a folder has none: transformers would make up one that knows no word."""
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise OSError(f"it has no tokenizer: none of {', '.join(sorted(files))}")
    return tokenizer


def hub_answers():
    """Whether the hub can be reached: asked once, since the library tries each file of a model for 40 s."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # The client, and with it the errors, is another in each version of huggingface_hub.
        return False
    return True


def half_precision_name(half_precision, family):
    """`half_precision` as `choose_precision` takes it, for a model of that model_type: "auto" is bfloat16 for T5's."""
    return {"auto": "bfloat16" if family in T5_FAMILY else "float16"}.get(half_precision, half_precision)


def half_precision_dtype(config, half_precision, precision):
    """The dtype in which a model runs, or None for single precision.

    config: the model's. half_precision: as from the command line; with "auto", where no type is named, the T5 family
    runs in bfloat16. precision: the harness Precision that was chosen by it.
    """
    return torch.bfloat16 if half_precision == "auto" and config.model_type in T5_FAMILY else precision.dtype


def check_length(argument, length, special):
    """UserError unless `length` tokens hold one of a text, too. special: tokens that an empty text has."""
    if length <= special:
        raise UserError(f"{argument} {length} leaves no room for a text; this model needs {special + 1} tokens")
