"""The images: three data sets as arrays. All images are uint8 [N, size, size, 3], all labels int64 [N]."""

import collections
import dataclasses
import functools
import hashlib
import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import numpy as np

from harness import torchvision_compat  # noqa: F401  (before torchvision)
from harness.endings import UserError, printable
from harness.machine import usable_cores
from picture_files import list_classes, read_picture

SIZE = 32
DARK = 16  # What 12-bit values stored in 16 bits reach after reduction to 8 bits, as dark as in a viewer.
MOST_NAMED = 20  # Of the files that are left out, in the record.
# What may be a mistake in a data set: its name in the record, and in words.
ODDITIES = {
    "test_pictures_in_training": "test images that are also training images",
    "pictures_in_several_classes": "training images that are in several classes",
    "test_pictures_in_several_classes": "test images that are in several classes",
    "train_pictures_repeated": "training images that repeat another of their class",
    "test_pictures_repeated": "test images that repeat another of their class",
    "dark_train_pictures": f"training images without a pixel above {DARK} of 255",
    "dark_test_pictures": f"test images without a pixel above {DARK} of 255",
}


@dataclasses.dataclass
class ImageData:
    """A data set. flip: whether a mirrored image keeps its class (a digit does not). left_out: Paths of files among the
    images that are not images. test_files: the names of the test images, if they are files."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: list
    flip: bool
    left_out: list = dataclasses.field(default_factory=list)
    test_files: list | None = None

    @property
    def size(self):
        """Height and width of an image in pixels."""
        return self.train_images.shape[1]

    @functools.cached_property
    def statistics(self):
        """Mean and scale of each channel of the training images in [0, 1]; two float32 [3].

        The scale is the standard deviation, or 1 if that is below a quarter of a level of 255, as for a constant
        channel: dividing by almost zero would let padding and differing images drown everything that can be learned.
        """
        # With histograms, since a float copy of CIFAR-10 would take 1.2 GB.
        values = np.arange(256) / 255
        counts = np.stack([np.bincount(self.train_images[..., channel].ravel(), minlength=256) for channel in range(3)])
        share = counts / counts.sum(1, keepdims=True)
        mean = share @ values
        std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
        return mean.astype(np.float32), np.where(std < 0.25 / 255, 1, std).astype(np.float32)

    @functools.cached_property
    def oddities(self):
        """{its name in the record: the number of images that suggest a mistake in the data set}, see ODDITIES."""
        train, test = _by_content(self.train_images, self.train_labels), _by_content(self.test_images, self.test_labels)
        return {
            "test_pictures_in_training": sum(sum(test[image].values()) for image in test.keys() & train.keys()),
            "pictures_in_several_classes": sum(len(labels) > 1 for labels in train.values()),
            "test_pictures_in_several_classes": sum(len(labels) > 1 for labels in test.values()),
            "train_pictures_repeated": _repeats(train),
            "test_pictures_repeated": _repeats(test),
            "dark_train_pictures": _dark(self.train_images),
            "dark_test_pictures": _dark(self.test_images),
        }

    def __str__(self):
        shown = [printable(name) for name in self.classes[:10]] + ["..."] * (len(self.classes) > 10)
        # Only files can have another size.
        resized = f", resized to {self.size}x{self.size}" if self.test_files is not None else ""
        text = (
            f"{len(self.train_labels)} training and {len(self.test_labels)} test images of "
            f"{len(self.classes)} classes ({', '.join(shown)}){resized}"
        )
        if self.left_out:
            names = [printable(str(path)) for path in self.left_out[:3]] + ["..."] * (len(self.left_out) > 3)
            why = "hidden, not named as images, or in no class folder"
            text += f"; {len(self.left_out)} files left out, {why} ({', '.join(names)})"
        found = [f"; {what}: {self.oddities[name]}" for name, what in ODDITIES.items() if self.oddities[name]]
        advice = "; if 16-bit files hold fewer bits, scale their values up first"
        is_dark = self.oddities["dark_train_pictures"] or self.oddities["dark_test_pictures"]
        return text + "".join(found) + advice * bool(is_dark)

    def state_dict(self):
        """What a run's record and saved state say of the data: plain values, enough to use the trained weights
        safely."""
        mean, std = self.statistics
        return {
            "classes": self.classes,
            "train_pictures": len(self.train_labels),
            "test_pictures": len(self.test_labels),
            **self.oddities,
            "files_left_out": len(self.left_out),
            "first_left_out": [printable("/".join(path.parts[-3:])) for path in self.left_out[:MOST_NAMED]],
            "size": self.size,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "digest": self.digest,
        }

    def load_state_dict(self, state):
        """UserError if `state`, saved with a run, is that of another data set."""
        changes = self.differs_from(state)
        if changes:
            raise UserError(
                f"--resume: the data set differs from the earlier run's: {changes}; --restart starts over, "
                "another --output_dir keeps both runs"
            )

    def differs_from(self, facts):
        """How this data set differs from that of `facts`, a state_dict, as text; "" if they are the same."""
        if facts.get("digest", self.digest) == self.digest:
            return ""
        was, now = facts["classes"], self.classes
        words = [f"class {name!r} is gone" for name in was if name not in now]
        words += [f"class {name!r} is new" for name in now if name not in was]
        for part, labels in (("train", self.train_labels), ("test", self.test_labels)):
            before = facts[f"{part}_pictures"]
            if before != len(labels):
                words.append(f"{len(labels)} {part} images instead of {before}")
        return ", ".join(words) or "other images, or another order, in the same classes"

    @functools.cached_property
    def digest(self):
        """A hash of the classes and of all pixels and labels in order, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:32]


def _by_content(images, labels):
    """{hash of an image's pixels: Counter of the labels of the images with these pixels}"""
    found = collections.defaultdict(collections.Counter)
    for image, label in zip(images, labels.tolist(), strict=True):
        found[hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest()][label] += 1
    return found


def _repeats(by_content):
    """The number of images that repeat another one of their own class."""
    return sum(sum(labels.values()) - len(labels) for labels in by_content.values())


def _dark(images):
    return int((images.reshape(len(images), -1).max(1) <= DARK).sum())


def load_images(dataset, data_dir, size=SIZE):
    """Load "cifar10", "digits" or "folder" as ImageData; UserError says what is missing or wrong.

    size: height and width in pixels that the images of a folder are resized to; the other data sets have SIZE.
    """
    if dataset == "folder":
        return _load_folder(Path(data_dir), size)
    if size != SIZE:
        raise UserError(
            f"the images of {dataset} are {SIZE}x{SIZE}, not {size}x{size}; only --dataset folder has other sizes"
        )
    return {"cifar10": _load_cifar10, "digits": _load_digits}[dataset](Path(data_dir))


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


def _composed(name):
    return unicodedata.normalize("NFC", name)


def _two_spellings(name, where):
    return UserError(
        f"{where} the class {name!r} with different Unicode characters that look the same (normalisation forms NFC and "
        "NFD); give both folders one name"
    )


def _load_folder(data_dir, size):
    (train, others), (test, more) = (list_classes(data_dir / split) for split in ("train", "test"))
    for has, lacks, classes in (("test", "train", test.keys() - train), ("train", "test", train.keys() - test)):
        if classes:
            there = train if lacks == "train" else test
            same = [name for name in sorted(classes) if _composed(name) in map(_composed, there)]
            if same:
                raise _two_spellings(same[0], f"{data_dir / has} and {data_dir / lacks} spell")
            raise UserError(f"{data_dir / has} has the class {min(classes)!r}, but {data_dir / lacks} does not")
    for name in train:
        if name != _composed(name) and _composed(name) in train:
            raise _two_spellings(name, f"{data_dir / 'train'} has two folders that spell")
    if len(train) == 1:
        raise UserError(f"{data_dir} has only the class {min(train)!r}; training needs at least two")
    arrays, files = [], []
    for classes in (train, test):
        files = [(path, label) for label, name in enumerate(sorted(train)) for path in classes[name]]
        images = np.empty((len(files), size, size, 3), np.uint8)
        with ThreadPoolExecutor(min(8, usable_cores())) as pool:
            for index, image in enumerate(pool.map(lambda file: read_picture(file[0], size), files)):
                images[index] = image
        arrays += [images, np.array([label for _, label in files], dtype=np.int64)]
    test_files = [path.relative_to(data_dir).as_posix() for path, _ in files]
    return ImageData(*arrays, sorted(train), flip=True, left_out=[*others, *more], test_files=test_files)
