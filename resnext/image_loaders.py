"""Batches of images: the augmentation, two loaders of augmented training batches, and the test batches.

The worker loader augments image by image in worker processes with torchvision; the device loader augments a whole batch
at once on the model's device. Both derive the same offsets and flips from (seed, epoch, index), and give the same
pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from harness import torchvision_compat  # noqa: F401  (before torchvision)
from harness.loading import worker_loader

PADDING = 4


def augmentation(seed, epoch, indices, flip):
    """The random part of augmenting the images `indices` (int [n]) in `epoch`.

    Returns top and left, int64 [n], uniform in 0..2*PADDING, and flip, bool [n], uniform (all False without `flip`):
    the crop's offsets in the padded image, and whether the crop is mirrored. Depends only on its arguments, through the
    SplitMix64 hash (Steele, Lea, Flood 2014).
    """
    counter = np.asarray(indices, dtype=np.uint64) + (np.uint64(epoch) << np.uint64(32))
    with np.errstate(over="ignore"):
        key = _splitmix64(np.array([seed], dtype=np.uint64))
        bits = _splitmix64(counter ^ key)
    span = np.uint64(2 * PADDING + 1)
    top = (bits & np.uint64(0xFFFF)) * span >> np.uint64(16)
    left = (bits >> np.uint64(16) & np.uint64(0xFFFF)) * span >> np.uint64(16)
    mirrored = (bits >> np.uint64(32) & np.uint64(1)).astype(bool) & flip
    return top.astype(np.int64), left.astype(np.int64), mirrored


def _splitmix64(state):
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return state ^ state >> np.uint64(31)


def normalise(images, mean, std):
    """uint8 [..., 3, H, W] to float32 of the same shape, scaled to [0, 1] and normalised with `mean` and `std` float32
    [3]."""
    from torchvision.transforms.v2 import functional

    return functional.normalize(functional.to_dtype(images, torch.float32, scale=True), mean.tolist(), std.tolist())


class AugmentedImages(Dataset):
    """Single training images, for the worker loader: (epoch, index) -> (float32 [3, H, W], int)."""

    def __init__(self, data, seed):
        self.images = torch.from_numpy(data.train_images)
        self.labels = data.train_labels
        self.mean, self.std = data.statistics
        self.flip, self.seed = data.flip, seed

    def __getitem__(self, position):
        from torchvision.transforms.v2 import functional

        epoch, index = position
        top, left, mirrored = (value[0] for value in augmentation(self.seed, epoch, [index], self.flip))
        image = self.images[index].permute(2, 0, 1)
        image = functional.pad(image, [PADDING] * 4)
        image = functional.crop(image, int(top), int(left), *self.images.shape[1:3])
        if mirrored:
            image = functional.horizontal_flip(image)
        return normalise(image, self.mean, self.std), int(self.labels[index])


class DeviceImages:
    """Loads and augments whole batches on `device`, which holds all training images as uint8.

    Iterating yields (`dtype` [n, 3, H, W] in `memory_format`, int64 [n]) on the device, in the order of the
    EpochBatches `batches`, with the same pixels as AugmentedImages.
    """

    def __init__(self, data, seed, batches, device, memory_format=torch.contiguous_format, dtype=torch.float32):
        padded = F.pad(torch.from_numpy(data.train_images).permute(0, 3, 1, 2), [PADDING] * 4)
        # A mirrored crop is a crop of the mirrored image.
        pictures = torch.cat([padded, padded.flip(3)]) if data.flip else padded
        pictures = pictures.contiguous(memory_format=memory_format).to(device)
        self.size, self.strides = data.size, pictures.stride()
        # A crop consists of runs of bytes: a row of one channel, or of all channels if they are interleaved. A view
        # with overlapping runs, one starting at every byte, allows selecting whole runs, several times faster than
        # single bytes.
        line = self.size * pictures.stride(3)
        self.lines = pictures.as_strided((pictures.numel() - line + 1, line), (1, 1))
        starts = torch.arange(self.size)[None, :] * pictures.stride(2)
        if pictures.stride(1) > 1:
            starts = starts + torch.arange(3)[:, None] * pictures.stride(1)
        self.starts = starts.flatten().to(device)  # Offsets of a crop's runs in its image.
        self.labels = torch.from_numpy(data.train_labels).to(device)
        # As large as an image: on a CPU, broadcasting over the last dimension of NHWC is slow.
        self.mean, self.std = (
            torch.from_numpy(each)[:, None, None]
            .expand(1, 3, self.size, self.size)
            .contiguous(memory_format=memory_format)
            .to(device)
            for each in data.statistics
        )
        self.flip, self.seed, self.batches = data.flip, seed, batches
        self.device, self.dtype = device, dtype

    @staticmethod
    def bytes_needed(data):
        return len(data.train_labels) * 3 * (data.size + 2 * PADDING) ** 2 * (2 if data.flip else 1)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        # One copy of an epoch's order and offsets; after that, the host only enqueues.
        shares = list(self.batches.batches())
        index = np.concatenate(shares) if shares else np.empty(0, dtype=np.int64)
        top, left, mirrored = augmentation(self.seed, self.batches.epoch, index, self.flip)
        epoch = torch.from_numpy(np.stack([index, top, left, mirrored])).to(self.device)
        for index, top, left, mirrored in (part.unbind() for part in epoch.split([len(share) for share in shares], 1)):
            yield self.augment(index, top, left, mirrored), self.labels[index]

    def augment(self, index, top, left, mirrored):
        """Images `index`, cropped at `top` and `left`, mirrored where `mirrored` is 1, and normalised.

        All int64 [n]; left is relative to the image before mirroring. Returns `dtype` [n, 3, H, W].
        """
        left = torch.where(mirrored.bool(), 2 * PADDING - left, left)
        picture, _, row, column = self.strides
        first = (index + mirrored * len(self.labels)) * picture + top * row + left * column
        pixels = self.lines.index_select(0, (first[:, None] + self.starts).flatten())
        if column > 1:
            pixels = pixels.view(-1, self.size, self.size, 3).permute(0, 3, 1, 2)
        else:
            pixels = pixels.view(-1, 3, self.size, self.size)
        return pixels.float().mul_(1 / 255).sub_(self.mean).div_(self.std).to(self.dtype)  # normalise(), in place.


def training_loader(kind, data, seed, batches, num_workers, device, say=print, **layout):
    """The loader of training batches: kind "workers" or "device"; falls back to workers if the device is full.

    layout: memory_format and dtype of the device loader's batches; the worker loader ignores it.
    """
    if kind == "device":
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")
        needed = DeviceImages.bytes_needed(data)
        if needed <= free / 2:
            return DeviceImages(data, seed, batches, device, **layout)
        say(f"the {needed / 1e9:.1f} GB of images do not fit on the device; loading by workers instead")
    return worker_loader(AugmentedImages(data, seed), batches, num_workers, device, say=say)


def evaluation_batches(data, batch_size, device, rank=0, world_size=1):
    """Yield this process's share of the test images on `device`, normalised: (float32 [n, 3, H, W], int64 [n]).

    Together, the shares of all processes contain every test image exactly once.
    """
    mean, std = data.statistics
    images, labels = data.test_images[rank::world_size], data.test_labels[rank::world_size]
    for start in range(0, len(labels), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size]).to(device).permute(0, 3, 1, 2).contiguous()
        yield normalise(batch, mean, std), torch.from_numpy(labels[start : start + batch_size]).to(device)
