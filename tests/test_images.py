"""Pictures: the data sets, and two loaders that give the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from harness.endings import UserError
from harness.loading import EpochBatches, largest_batch
from image_loaders import PADDING, AugmentedImages, DeviceImages, augmentation, evaluation_batches, training_loader
from images import SIZE, ImageData, load_images

CPU = torch.device("cpu")


def random_data(count=40, flip=True):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    labels = random.integers(0, 5, count)
    return ImageData(images, labels, images[:13], labels[:13], list("abcde"), flip)


def test_augmentation_is_uniform_and_a_function_of_its_arguments():
    top, left, mirrored = augmentation(3, 7, np.arange(90_000), flip=True)
    for offsets in (top, left):
        counts = np.bincount(offsets, minlength=2 * PADDING + 1)
        assert len(counts) == 9
        assert np.abs(counts - 10_000).max() < 500
    assert abs(mirrored.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.02
    again = augmentation(3, 7, [5, 4], flip=True)
    assert [values.tolist() for values in again] == [values[[5, 4]].tolist() for values in (top, left, mirrored)]
    assert not np.array_equal(augmentation(3, 8, np.arange(99), True)[0], augmentation(3, 7, np.arange(99), True)[0])
    assert not np.array_equal(augmentation(4, 7, np.arange(99), True)[0], augmentation(3, 7, np.arange(99), True)[0])
    assert not augmentation(3, 7, np.arange(99), flip=False)[2].any()


def test_pixels_are_torchvisions_for_given_offsets_and_flips():
    data = random_data()
    batches = EpochBatches(40, 8, seed=5)
    batches.start(2)
    mean, std = data.statistics
    plain = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean.tolist(), std.tolist())])
    dataset = AugmentedImages(data, seed=5)
    for (images, labels), indices in zip(DeviceImages(data, 5, batches, CPU), list(batches.batches()), strict=True):
        drawn = augmentation(5, 2, indices, flip=True)
        for image, label, index, top, left, mirrored in zip(images, labels, indices, *drawn, strict=True):
            expected = functional.pad(Image.fromarray(data.train_images[index]), [PADDING] * 4)
            expected = functional.crop(expected, int(top), int(left), SIZE, SIZE)
            expected = plain(functional.horizontal_flip(expected) if mirrored else expected)
            assert torch.equal(image, expected)
            assert torch.equal(dataset[2, int(index)][0], expected)
            assert label == data.train_labels[index] == dataset[2, int(index)][1]


@pytest.mark.parametrize("flip", [True, False])
def test_device_loading_in_the_layout_and_type_of_the_model_has_the_same_pixels(flip):
    data = random_data(flip=flip)
    batches = EpochBatches(40, 8, seed=5)
    layout = {"memory_format": torch.channels_last, "dtype": torch.bfloat16}
    plain, model = (DeviceImages(data, 5, batches, CPU, **each) for each in ({}, layout))
    for (images, labels), (others, other_labels) in zip(plain, model, strict=True):
        assert images.is_contiguous()
        assert others.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images.bfloat16(), others)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("first", [0, 3])
def test_loaders_give_the_same_batches(first):
    data = random_data()
    seen = []
    for kind, workers in (("workers", 0), ("workers", 2), ("device", 0)):
        batches = EpochBatches(40, 9, seed=1)
        loader = training_loader(kind, data, 1, batches, workers, CPU)
        for epoch in (0, 1):
            batches.start(epoch, first)
            seen.append(list(loader))
            assert len(seen[-1]) == len(loader) == 5 - first
    for other in seen[2::2]:
        for (images, labels), (others, other_labels) in zip(seen[0], other, strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)
    assert not torch.equal(seen[0][0][0], seen[1][0][0])


def test_shares_of_a_batch_are_the_batch():
    whole = EpochBatches(21, 8, seed=0)
    shares = [EpochBatches(21, 8, seed=0, rank=rank, world_size=2) for rank in range(2)]
    for number, (batch, *parts) in enumerate(zip(*(each.batches() for each in (whole, *shares)), strict=True)):
        assert sorted(np.concatenate(parts)) == sorted(batch)
        weights = [share.weight(number) for share in shares]
        assert weights == [2 * len(part) / len(batch) for part in parts]
    # 17 = 2 * 8 + 1: the second process has none of the last picture, and a stand-in that weighs nothing.
    last = EpochBatches(17, 8, seed=0, rank=1, world_size=2)
    assert [len(batch) for batch in last.batches()] == [4, 4, 1]
    assert last.weight(2) == 0


def test_evaluation_counts_each_picture_once():
    data = random_data()
    shares = [list(evaluation_batches(data, 4, CPU, rank, 3)) for rank in range(3)]
    assert sum(len(labels) for share in shares for _, labels in share) == 13


def test_statistics():
    data = random_data()
    mean, std = data.statistics
    assert data.statistics is data.statistics  # CIFAR-10's take most of a second, and every evaluation asks for them.
    pixels = data.train_images.reshape(-1, 3) / 255
    assert mean == pytest.approx(pixels.mean(0), abs=1e-6)
    assert std == pytest.approx(pixels.std(0), abs=1e-6)


@pytest.mark.parametrize(
    ("red", "scale"),
    [(np.full(40, 255), 1), (np.arange(40) == 0, 1), (np.arange(40) % 2, None), (np.arange(40) % 4, None)],
)
def test_a_channel_that_hardly_changes_is_not_blown_up(red, scale):
    data = random_data()
    data.train_images[..., 0] = red[:, None, None]
    _, std = data.statistics
    assert std[0] == pytest.approx(scale or data.train_images[..., 0].std() / 255)
    batches = EpochBatches(40, 40, seed=0)
    (images, _), *_ = DeviceImages(data, 0, batches, CPU)
    assert images.abs().max() < 10
    data.test_images = np.full_like(data.test_images, 1)
    assert next(evaluation_batches(data, 40, CPU))[0].abs().max() < 10


def test_the_digest_knows_every_pixel_label_and_their_order():
    digests = set()
    for change in range(5):
        data = random_data()
        if change == 1:
            data.test_images[3, 2, 1, 0] ^= 1
        if change == 2:
            data.train_labels[0] = (data.train_labels[0] + 1) % 5
        if change == 3:
            data.train_images[:2] = data.train_images[1::-1]
        if change == 4:
            data.train_images, data.train_labels = data.train_images[:-1], data.train_labels[:-1]
        digests.add(data.state_dict()["digest"])
    assert len(digests) == 5
    assert random_data().state_dict()["digest"] in digests


def test_digits():
    data = load_images("digits", "")
    assert data.train_images.shape == (1437, 32, 32, 3)
    assert data.test_images.shape == (360, 32, 32, 3)
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() == 255
    counts = np.bincount(data.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_folder(pictures, tmp_path):
    data = load_images("folder", pictures)
    assert data.classes == ["dark", "light"]
    assert data.train_images.shape == (44, 32, 32, 3)
    assert data.test_labels.tolist() == [0] * 5 + [1] * 5
    assert data.train_images[:22].mean() < 80 < 170 < data.train_images[22:].mean()

    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    Image.new("L", (50, 40), 7).save(tmp_path / "train" / "a" / "grey and wide.png")
    with pytest.raises(UserError, match=r"test has no class folders with images"):
        load_images("folder", tmp_path)
    (tmp_path / "test" / "a").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "a" / "x.webp")
    with pytest.raises(UserError, match="has only the class 'a'"):
        load_images("folder", tmp_path)

    (tmp_path / "test" / "b").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "b" / "x.png")
    with pytest.raises(UserError, match=r"class 'b', but .*train does not"):
        load_images("folder", tmp_path)
    (tmp_path / "train" / "b").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "b" / "x.png")
    assert (load_images("folder", tmp_path).train_images[0] == 7).all()
    (tmp_path / "train" / "b" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(UserError, match=r"cannot decode the image .*broken\.jpg"):
        load_images("folder", tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        load_images("folder", tmp_path / "nowhere")


def test_a_device_without_room_falls_back_to_workers(monkeypatch):
    said = []
    loader = DeviceImages(random_data(), 0, EpochBatches(40, 9, 0), CPU)
    assert loader.lines.untyped_storage().nbytes() == DeviceImages.bytes_needed(random_data())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    loader = training_loader(
        "device", random_data(), 0, EpochBatches(40, 9, 0), 0, torch.device("cuda"), say=said.append
    )
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert "do not fit on the device" in said[0]
    fits = training_loader("device", random_data(), 0, EpochBatches(40, 9, 0), 0, CPU)
    assert isinstance(fits, DeviceImages)


def test_the_order_is_one_for_a_seed_and_an_epoch():
    def order(seed, epoch):
        batches = EpochBatches(40, 8, seed)
        batches.start(epoch)
        return batches.order().tolist()

    found = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, found))) == 4
    assert order(1, 0) == found[2]


def test_what_is_left_of_an_epoch_is_counted_in_samples_and_in_shares():
    batches = EpochBatches(20, 8, seed=0)
    assert [batches.samples_from(number) for number in range(4)] == [20, 12, 4, 0]
    assert [largest_batch(*each) for each in ((100, 8, 1), (100, 8, 2), (5, 8, 1), (5, 8, 2), (1, 8, 4))] == [
        8, 4, 5, 2, 1,
    ]  # fmt: skip
