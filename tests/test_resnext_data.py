"""What the ResNeXt scripts make of a data set: they say it and record it, and no run goes on with another one; pictures
of another size; trained weights to begin with."""

import json
import shutil

import launch
import numpy as np
import pytest
import torch
from PIL import Image

from models.resnext import Block, ResNeXt
from weights import start_from, weights_digest

NAME = "resnext_0_worker_8_resnext29_1x4d_folder"


@pytest.fixture
def place(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    return tmp_path


def train(place, *more, script="resnext", code=0):
    arguments = "--dataset folder --data_dir pictures --model resnext29_1x4d --batch_size 8 --num_worker 0 --lr 0.002"
    ended = launch.run(f"resnext/{script}.py", *arguments.split(), "--num_epoch", 1, *more, cwd=place)
    assert ended.code == code, ended.err
    return ended.out if code == 0 else ended.err


def test_the_data_set_is_said_and_recorded(place):
    (place / "pictures/test/notes.txt").touch()
    said = train(place).splitlines()[0]
    assert said.startswith("44 training and 10 test images of 2 classes (dark, light), resized to 32x32; 1 files left")
    data = json.loads((place / f"model_history/{NAME}.json").read_text())["data"]
    paths = sorted((place / "pictures/train").rglob("*.png"))
    pixels = np.stack([np.array(Image.open(path)) for path in paths]).reshape(-1, 3) / 255
    assert data["mean"] == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)
    assert data["std"] == pytest.approx(pixels.std(0).tolist(), abs=1e-6)
    known = {key: data[key] for key in ("classes", "train_pictures", "test_pictures", "size")}
    assert known == {"classes": ["dark", "light"], "train_pictures": 44, "test_pictures": 10, "size": 32}


def test_images_that_are_in_both_splits_or_in_two_classes_are_told(place):
    pictures = place / "pictures"
    shutil.copy(pictures / "train/dark/0.png", pictures / "test/dark/seen.png")
    shutil.copy(pictures / "train/dark/1.png", pictures / "train/light/other.png")
    said = train(place).splitlines()[0]
    assert "; test images that are also training images: 1" in said
    assert "; training images that are in several classes: 1" in said
    data = json.loads((place / f"model_history/{NAME}.json").read_text())["data"]
    assert (data["test_pictures_in_training"], data["pictures_in_several_classes"]) == (1, 1)


def test_outputs_that_overflow_where_every_weight_is_finite_end_the_run(place):
    line = train(place, "--lr", 1000, "--batch_size", 44, code=2)
    assert "the model's outputs for test images became NaN or infinite in epoch 1. Use a smaller --lr" in line
    assert line.count("\n") == 1
    assert not list(place.glob("model_history/*.json"))


def test_an_image_with_very_many_pixels_is_told_by_name(place):
    Image.new("RGB", (40, 40)).save(place / "pictures/test/dark/la\nrge.png")
    arguments = "--dataset folder --data_dir pictures --model resnext29_1x4d --batch_size 8 --num_worker 0 --dry_run"
    limit = "from PIL import Image; Image.MAX_IMAGE_PIXELS = 1500"
    ended = launch.run("resnext/resnext.py", *arguments.split(), cwd=place, before=limit)
    assert ended.err == (
        "warning: pictures/test/dark/la\\nrge.png has 40x40 pixels; decoding it takes much memory, so make it smaller\n"
    )


def test_a_class_whose_name_has_a_line_break_stays_on_its_line(place):
    rename(place, "dark", "da\nrk")
    assert "2 classes (da\\nrk, light)" in train(place).splitlines()[0]


def rename(place, old, new):
    for split in ("train", "test"):
        (place / f"pictures/{split}/{old}").rename(place / f"pictures/{split}/{new}")


def swap(place):
    one, two = (place / f"pictures/train/{name}/0.png" for name in ("dark", "light"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


CHANGES = {
    "class 'dark' is gone, class 'night' is new": lambda place: rename(place, "dark", "night"),
    "class 'dark' is gone, class 'darl' is new": lambda place: rename(place, "dark", "darl"),
    "45 train images instead of 44": lambda place: shutil.copy(
        place / "pictures/train/dark/0.png", place / "pictures/train/dark/new.png"
    ),
    "11 test images instead of 10": lambda place: Image.new("L", (9, 9)).save(place / "pictures/test/dark/new.gif"),
    "other images, or another order, in the same classes": swap,
}


def test_a_run_goes_on_with_the_same_pictures_alone(place):
    train(place)
    for index, (words, change) in enumerate(CHANGES.items()):
        changed = place / f"changed{index}"
        shutil.copytree(place / "model_history", changed / "model_history")
        shutil.copytree(place / "pictures", changed / "pictures")
        change(changed)
        for epochs in (1, 2):  # Where the run is finished, and where it goes on.
            line = train(changed, "--num_epoch", epochs, "--resume", code=2)
            assert line.startswith(
                f"resnext.py: --resume: the data set differs from the earlier run's: {words}; --restart"
            )
    moved = place / "elsewhere"
    (place / "pictures").rename(moved)
    assert "epoch 2/2" in train(place, "--data_dir", moved, "--num_epoch", 2, "--resume")


@pytest.mark.parametrize(("script", "end"), [("resnext_checkpoint", "_checkpoint"), ("resnext_fast", "_fast")])
def test_other_sizes(place, script, end):
    Image.new("RGB", (200, 100)).save(place / "pictures/train/dark/wide.png")
    train(place, "--size", 48, script=script)
    (path,) = place.glob(f"model_history/*_48px*{end}.json")
    assert json.loads(path.read_text())["data"]["size"] == 48
    evaluated = launch.run("resnext/evaluate.py", path.with_suffix(".pt"), cwd=place)
    assert "as the run's record says" in evaluated.out
    if script == "resnext_checkpoint":
        train(place, "--size", 48)
        weights, plain = (torch.load(path.with_name(f"{path.stem.removesuffix(other)}.pt")) for other in ("", end))
        assert all(torch.equal(weights[name], plain[name]) for name in plain)


@pytest.mark.parametrize("size", [24, 48])
def test_the_gradients_of_narrow_shortcuts_in_channels_last(size):
    torch.manual_seed(0)
    exact = Block(8, 1, 8, stride=2).double()
    images, found = torch.randn(8, 8, size, size), []
    for block, batch in ((exact, images.double()), (exact, images.to(memory_format=torch.channels_last))):
        block = block.to(batch.dtype, memory_format=torch.channels_last)
        block.zero_grad()
        block(batch).square().sum().backward()
        found.append(block.shortcut[0].weight.grad.clone())
    assert (found[1] - found[0]).abs().max() < 1e-3 * found[0].abs().max()


def test_training_starts_from_trained_weights(tmp_path):
    torch.manual_seed(0)
    trained, said = ResNeXt(1, 4, num_classes=3), []
    torch.save(trained.state_dict(), tmp_path / "run.pt")

    def started(classes):
        model = ResNeXt(1, 4, num_classes=len(classes))
        before = model.linear.weight.clone()
        start_from(tmp_path / "run.pt", model, classes, said.append)
        assert torch.equal(model.layer2[0].conv2.weight, trained.layer2[0].conv2.weight)
        return torch.equal(model.linear.weight, before)

    assert not started(["a", "b", "c"])
    assert "no record gives its 3 classes; assuming that they are those here" in said.pop()
    assert started(["a", "b"])
    assert "trained on 3 other classes than the 2 here; the last layer starts from random" in said.pop()
    (tmp_path / "run.json").write_text(json.dumps({"arguments": {}, "data": {"classes": ["a", "b", "d"]}}))
    assert started(["a", "b", "c"])
    assert "trained on 3 other classes than the 3 here" in said.pop()


def test_the_scripts_take_trained_weights(place):
    first = train(place, "--lr", 0.005, "--num_epoch", 2, "--output_dir", "first")
    assert "acc 100.00 %" in first
    train(place, "--init", f"first/{NAME}.pt", "--lr", 1e-9)
    record = json.loads((place / f"model_history/{NAME}_init.json").read_text())
    assert record["epochs"][0]["loss"] < 0.05  # From random weights ten times as much.
    # Its own weights would be gone with what they become.
    before = (place / f"model_history/{NAME}_init.pt").read_bytes()
    line = train(place, "--init", f"model_history/{NAME}_init.pt", "--restart", code=2)
    assert f"--init model_history/{NAME}_init.pt is the file that this run writes" in line
    assert (place / f"model_history/{NAME}_init.pt").read_bytes() == before


def test_a_run_goes_on_without_the_weights_that_it_began_with_but_not_with_others(place):
    train(place, "--output_dir", "first")
    weights, begun = place / f"first/{NAME}.pt", ["--init", f"first/{NAME}.pt"]
    train(place, *begun)
    record = json.loads((place / f"model_history/{NAME}_init.json").read_text())
    assert record["init"]["weights_digest"] == weights_digest(weights)
    torch.save(torch.load(weights) | {"linear.bias": torch.zeros(2)}, weights)
    for epochs in (1, 2):  # Where the run is finished, and where it goes on.
        line = train(place, *begun, "--resume", "--num_epoch", epochs, code=2)
        assert f"--init first/{NAME}.pt has other weights than those that the run to resume started from" in line
    weights.unlink()
    assert "nothing to resume" in train(place, *begun, "--resume")
    train(place, *begun, "--resume", "--num_epoch", 2)
    longer = json.loads((place / f"model_history/{NAME}_init.json").read_text())
    assert longer["init"] == record["init"]


def test_the_record_of_other_weights_gives_no_classes(place, capsys):
    trained = ResNeXt(1, 4, num_classes=2)
    torch.save(trained.state_dict(), place / "run.pt")
    record = {"arguments": {}, "data": {"classes": ["dark", "light"]}, "weights_digest": "0123"}
    (place / "run.json").write_text(json.dumps(record))
    model = ResNeXt(1, 4, num_classes=2)
    started = start_from(place / "run.pt", model, ["dark", "light"], print)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.endswith("run.pt; the last layer starts from random weights\n")
    assert "run.json is the record of other weights than" in told.err
    assert not torch.equal(model.linear.weight, trained.linear.weight)
    assert started == {"weights_digest": weights_digest(place / "run.pt"), "record_of_other_weights": True,
                       "new_last_layer": True}  # fmt: skip
