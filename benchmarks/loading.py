"""The speed-up of the device loader over the original's loader in one process. Target: 40, with one thread each.

    python3 benchmarks/loading.py                                     50,000 random images, as large as CIFAR-10
    python3 benchmarks/loading.py --dataset folder --data_dir DIR     any images that resnext.py takes

A few images would fit into the processor's cache, which would flatter the device loader. So by default there are as
many as in CIFAR-10, with flips; their content does not matter.

The original's loader is ordinary user code: a torchvision dataset of PIL images, transforms v1, and a DataLoader
without workers. Before the timing, every image of an epoch is checked against torchvision's for the same offsets and
flips, and these are checked to be evenly distributed. Each side then loads whole epochs.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, ROOT, check, finish, get_parser, interleaved_rounds, new_record, ratio_summary, save

import numpy as np
import torch
from fast_steps import random_pictures
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from harness import arguments, endings
from harness.loading import EpochBatches
from image_loaders import PADDING, DeviceImages, augmentation
from images import SIZE, load_images

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TARGETS = {
    "cpu": {
        "device loader, contiguous, 1 thread": ("at least", 40.0),
        "device loader, channels_last, 1 thread": ("at least", 40.0),
    }
}
TOLERANCE = 1e-6  # Transforms v1 divide by 255; v2 and our loader multiply by 1 / 255.


def get_args_parser():
    parser = get_parser(__doc__, "loading", rounds=7)
    parser.add_argument("--dataset", choices=("random", "cifar10", "digits", "folder"), default="random")
    parser.add_argument("--data_dir", default=str(ROOT / "resnext" / "data"))
    parser.add_argument("--batch_size", type=arguments.positive_int, default=128)
    parser.add_argument(
        "--threads", type=arguments.positive_int, nargs="+", default=[1], help="threads of the device loader on a CPU"
    )
    return parser


def main():
    args = get_args_parser().parse_args()
    data = random_pictures(50_000, SIZE) if args.dataset == "random" else load_images(args.dataset, args.data_dir)
    torch.set_num_threads(1)  # For the original's loader; device_arm sets its own.
    largest = largest_difference(data, args.batch_size, DEVICE)
    print(f"{len(data.train_labels)} images; largest difference from torchvision's: {largest:.1e}", flush=True)
    check(largest <= TOLERANCE, f"the device loader is off by {largest:.1e}")
    check_evenly_spread()

    original = DataLoader(OriginalImages(data), batch_size=args.batch_size, shuffle=True, num_workers=0)
    arms = {"original": lambda: load_epoch(original)}
    for threads in args.threads:
        for layout, memory_format in LAYOUTS.items():
            arms[f"device loader, {layout}, {threads} thread{'s' * (threads > 1)}"] = device_arm(
                data, args.batch_size, DEVICE, memory_format, threads
            )
    for arm in arms.values():
        arm()  # Warm up.
    record = new_record("loading", DEVICE, dataset=args.dataset)
    record |= {"pictures": len(data.train_labels), "batch_size": args.batch_size, "largest_difference": largest}
    for seconds in interleaved_rounds(arms, args.rounds):
        rates = {name: len(data.train_labels) / statistics.median(values) for name, values in seconds.items()}
        ratios = {name: ratio_summary(seconds["original"], seconds[name]) for name in arms if name != "original"}
        record |= {"seconds": seconds, "pictures_per_second": rates, "ratios": ratios}
        save(record, args)
    for name, rate in rates.items():
        print(f"{name}: {rate:.0f} images/s")
    finish(record, args)


class OriginalImages(Dataset):
    """The training images of the ImageData `data`, one at a time, as torchvision's datasets return them."""

    def __init__(self, data):
        from torchvision import transforms  # After `images`, which makes torchvision work with a CPU-only torch.

        mean, std = data.statistics
        flip = [transforms.RandomHorizontalFlip()] if data.flip else []
        crop = transforms.RandomCrop(SIZE, padding=PADDING)
        normalise = transforms.Normalize(mean.tolist(), std.tolist())
        self.data, self.targets = data.train_images, data.train_labels.tolist()
        self.transform = transforms.Compose([crop, *flip, transforms.ToTensor(), normalise])

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def device_arm(data, batch_size, device, memory_format, threads):
    batches = EpochBatches(len(data.train_labels), batch_size, seed=0)
    loader = DeviceImages(data, 0, batches, device, memory_format)

    def arm():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        batches.start(batches.epoch + 1)
        load_epoch(loader)
        torch.set_num_threads(before)

    return arm


def load_epoch(loader):
    for _images, _labels in loader:
        pass


def largest_difference(data, batch_size, device):
    """The largest difference between any value of the device loader's first epoch and torchvision's transforms v1 with
    the same offsets and flips; AssertionError unless the labels are equal."""
    from torchvision.transforms import functional

    batches = EpochBatches(len(data.train_labels), batch_size, seed=0)
    mean, std = (each.tolist() for each in data.statistics)
    differences = []
    for index, (images, labels) in zip(batches.batches(), DeviceImages(data, 0, batches, device), strict=True):
        check(labels.tolist() == data.train_labels[index].tolist(), "the device loader's labels differ")
        expected = []
        for number, top, left, mirrored in zip(index, *augmentation(0, 0, index, data.flip), strict=True):
            picture = functional.pad(Image.fromarray(data.train_images[number]), PADDING)
            picture = functional.crop(picture, top, left, SIZE, SIZE)
            picture = functional.hflip(picture) if mirrored else picture
            expected.append(functional.normalize(functional.to_tensor(picture), mean, std))
        differences.append(float((images.cpu() - torch.stack(expected)).abs().max()))
    return float(np.max(differences))  # max() would leave out a NaN that does not come first.


def check_evenly_spread(pictures=200_000):
    """Raise AssertionError unless the 9 x 9 x 2 crops are equally frequent, as in torchvision, to five standard
    deviations."""
    top, left, mirrored = augmentation(0, 0, np.arange(pictures), flip=True)
    span = 2 * PADDING + 1
    counts = np.bincount((top * span + left) * 2 + mirrored, minlength=2 * span**2)
    share = 1 / (2 * span**2)
    worst = np.abs(counts - pictures * share).max() / np.sqrt(pictures * share * (1 - share))
    check(worst <= 5, f"a crop's frequency is {worst:.1f} standard deviations from the expected one")


if __name__ == "__main__":
    endings.run(main)
