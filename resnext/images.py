"""The pictures: three data sets as arrays. All pictures are uint8 [N, 32, 32, 3], all labels int64 [N]."""

import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np

from harness import torchvision_compat  # noqa: F401  (before torchvision)
from harness.endings import UserError

SIZE = 32
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}


@dataclasses.dataclass
class ImageData:
    """A data set. flip: whether a mirrored picture keeps its class (a digit does not)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list
    flip: bool

    @functools.cached_property
    def statistics(self):
        """Mean and standard deviation of each channel of the training pictures in [0, 1]; two float32 [3]."""
        # Histograms, since a float copy of CIFAR-10 would take 1.2 GB.
        values = np.arange(256) / 255
        counts = np.stack([np.bincount(self.train_images[..., channel].ravel(), minlength=256) for channel in range(3)])
        share = counts / counts.sum(1, keepdims=True)
        mean = share @ values
        std = np.sqrt(np.maximum(share @ values**2 - mean**2, 1e-12))
        return mean.astype(np.float32), std.astype(np.float32)


def load_images(dataset, data_dir):
    """Load "cifar10", "digits" or "folder" as ImageData; UserError says what is missing or wrong."""
    return {"cifar10": _load_cifar10, "digits": _load_digits, "folder": _load_folder}[dataset](Path(data_dir))


def _load_cifar10(data_dir):
    from torchvision.datasets import CIFAR10

    try:
        train = CIFAR10(data_dir, train=True, download=True)
        test = CIFAR10(data_dir, train=False)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"CIFAR-10 is not in {data_dir} and could not be downloaded ({reason}); use --dataset digits, which needs "
            f"no download, or name the folder that holds cifar-10-batches-py with --data_dir"
        ) from None
    return ImageData(train.data, np.array(train.targets), test.data, np.array(test.targets), train.classes, flip=True)


def _load_digits(data_dir):
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = (digits.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.array(Image.fromarray(image).resize((SIZE, SIZE), Image.BILINEAR)) for image in small])
    images = np.repeat(large[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    classes = [str(name) for name in digits.target_names]
    return ImageData(images[train], labels[train], images[test], labels[test], classes, flip=False)


def _load_folder(data_dir):
    paths = {split: _list_pictures(data_dir / split) for split in ("train", "test")}
    classes = sorted(paths["train"])
    extra = sorted(set(paths["test"]) - set(classes))
    if extra:
        raise UserError(f"{data_dir / 'test'} has the class {extra[0]!r}, which {data_dir / 'train'} lacks")
    arrays = []
    for split in ("train", "test"):
        files = [(path, label) for label, name in enumerate(classes) for path in paths[split].get(name, ())]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = np.stack(list(pool.map(_read_picture, [path for path, _ in files])))
        arrays += [images, np.array([label for _, label in files], dtype=np.int64)]
    return ImageData(*arrays, classes, flip=True)


def is_picture(path):
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def _list_pictures(folder):
    """{class: sorted paths} of `folder`/<class>/*; hidden and foreign files are passed over."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --data_dir needs train/<class>/* and test/<class>/*")
    found = {
        child.name: sorted(path for path in child.iterdir() if is_picture(path))
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
    }
    found = {name: paths for name, paths in found.items() if paths}
    if not found:
        raise UserError(f"{folder} has no class folders with pictures in them; it needs <class>/*.png or the like")
    return found


def _read_picture(path):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = image.resize((SIZE, SIZE), Image.BILINEAR)
            return np.array(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot decode the picture {path} ({type(error).__name__}); replace or remove it") from None
