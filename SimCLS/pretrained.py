"""Loading the tokenizer of a model in `from_pretrained` form, a folder or a name on the hub."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

from transformers import AutoTokenizer


def load_tokenizer(name, **options):
    """The tokenizer of `name`. OSError when a folder has none: transformers would make up one that knows no word."""
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        raise OSError(f"it has no tokenizer: none of {', '.join(sorted(files))}")
    return tokenizer
