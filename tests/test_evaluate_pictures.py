"""resnext/evaluate.py on runs of this repository, on weights of pytorch-cifar, and on pictures of one's own."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import evaluate as evaluate_script
import launch
import numpy as np
import pytest
import torch
from PIL import Image

import export_model
from confusion import Predictions, class_lines, draw_matrix, draw_mistakes, literal, matrix_lines
from harness.endings import UserError
from weights import load_model, read_record

NAME = "resnext_0_worker_8_resnext29_1x4d_folder"


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A folder with `pictures`, and a run of one epoch on them in model_history, which takes all for one class."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(pictures, folder / "pictures")
    arguments = (
        "--dataset folder --data_dir pictures --model resnext29_1x4d --batch_size 8 --num_worker 0 --num_epoch 1"
    )
    ended = launch.run("resnext/resnext.py", *arguments.split(), "--lr", 0.002, cwd=folder)
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def place(trained, tmp_path):
    """A copy of `trained` to change."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def evaluate(place, *arguments, code=0):
    ended = launch.run("resnext/evaluate.py", f"model_history/{NAME}.pt", *arguments, cwd=place)
    assert ended.code == code, ended.err
    return ended.out if code == 0 else ended.err


def change_record(place, change):
    path = place / f"model_history/{NAME}.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def logits(place, *paths):
    """Of the run's model for picture files, without this repository's loading."""
    data = json.loads((place / f"model_history/{NAME}.json").read_text())["data"]
    pixels = np.stack([np.array(Image.open(place / path)) for path in paths]) / 255
    pixels = (pixels - np.array(data["mean"])) / np.array(data["std"])
    with torch.inference_mode():
        return load_model(place / f"model_history/{NAME}.pt")(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))


def test_on_the_test_pictures(place):
    files = [f"test/{name}/{number}.png" for name in ("dark", "light") for number in range(5)]
    output = logits(place, *(f"pictures/{file}" for file in files))
    wrong = [number for number, label in enumerate(output.argmax(1)) if label != number // 5]
    accuracy = 100 - 10 * len(wrong)
    assert wrong  # Or there would be little to see.
    shown = evaluate(place)
    assert shown.startswith(f"test accuracy {accuracy}.00 % of 10 images, as the run's record says\n")
    results = json.loads((place / f"model_history/{NAME}.evaluation.json").read_text())
    confusion = [[sum(1 for number in range(5 * row, 5 * row + 5) if output[number].argmax() == column)
                  for column in (0, 1)] for row in (0, 1)]  # fmt: skip
    assert results["confusion"] == confusion
    assert results["test_acc"] == accuracy
    assert results["test_acc_by_class"] == {"dark": 20 * confusion[0][0], "light": 20 * confusion[1][1]}
    surest = sorted(wrong, key=lambda number: -float(output[number].softmax(0).max()))
    assert [each["picture"] for each in results["surest_and_wrong"]] == [files[number] for number in surest]
    assert results["surest_and_wrong"][0]["probability"] == pytest.approx(float(output[surest[0]].softmax(0).max()))
    for name in ("confusion", "mistakes"):
        assert min(Image.open(place / f"model_history/{NAME}.{name}.png").size) > 200
    report = launch.run("report.py", "model_history", cwd=place)
    assert "evaluation" not in report.err


@pytest.mark.parametrize("figure", ["confusion", "mistakes"])
def test_a_figure_that_no_evaluation_drew_is_not_replaced(place, figure):
    mine = place / f"own_{figure}/{NAME}.{figure}.png"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    assert f"{mine.name} already exists, without its" in evaluate(place, "--output_dir", mine.parent, code=2)
    assert list(mine.parent.iterdir()) == [mine]
    assert mine.read_bytes() == b"precious"


def test_an_evaluation_of_other_pictures_replaces_none_and_claims_nothing_of_the_record(place):
    evaluate(place)
    before = (place / f"model_history/{NAME}.evaluation.json").read_bytes()
    shutil.copytree(place / "pictures", place / "others")
    (place / "others/test/dark/0.png").unlink()
    evaluate(place)  # Of the same again.
    for other in (["--data_dir", "others"], ["--mean", 0.1, 0.1, 0.1]):
        assert f"{NAME}.evaluation.json already exists and is not of these weights and images" in evaluate(
            place, *other, code=2
        )
        assert "record says" not in evaluate(place, *other, "--output_dir", f"own{len(other)}")
    assert (place / f"model_history/{NAME}.evaluation.json").read_bytes() == before


def test_an_evaluation_of_other_weights_is_not_replaced_nor_is_what_is_none(place):
    evaluate(place, "--output_dir", "ev")
    weights, path = place / f"model_history/{NAME}.pt", place / f"ev/{NAME}.evaluation.json"
    changed = torch.load(weights, weights_only=True)
    changed["linear.bias"] += 1
    torch.save(changed, weights)
    for content in (path.read_bytes(), b"mine"):
        path.write_bytes(content)
        assert "already exists and is not of these weights" in evaluate(place, "--output_dir", "ev", code=2)
        assert path.read_bytes() == content


def test_the_record_of_other_weights_is_told(place):
    def run(*more):
        ended = launch.run("resnext/evaluate.py", f"model_history/{NAME}.pt", *more, cwd=place)
        return ended.out, ended.err

    out, err = run()
    assert "as the run's record says" in out
    assert err == ""
    weights = place / f"model_history/{NAME}.pt"
    torch.save(torch.load(weights) | {"linear.bias": torch.zeros(2)}, weights)
    for more in (["--output_dir", "ev"], ["--pictures", "pictures/test/dark/0.png"]):
        out, err = run(*more)
        assert "record" not in out
        of = f"warning: model_history/{NAME}.json is the record of other weights than model_history/{NAME}.pt; its cl"
        assert err.startswith(of)
        assert err.count("\n") == 1
    run("--export", "out.pt2")
    notes = {"warning.json": ""}
    torch.export.load(place / "out.pt2", extra_files=notes)
    kept = json.loads((place / f"ev/{NAME}.evaluation.json").read_text())["warning"]
    assert kept == json.loads(notes["warning.json"])
    assert kept.endswith("is of other weights")


def test_weights_that_are_cut_or_compute_nothing_finite_are_refused(place):
    weights = place / f"model_history/{NAME}.pt"
    content, tensors = weights.read_bytes(), torch.load(weights, weights_only=True)
    for length in (len(content) // 2, len(content) - 30, len(content) - 1):
        weights.write_bytes(content[:length])
        assert f"{NAME}.pt has no ResNeXt-29 weights" in evaluate(place, code=2)
    for name in tensors:
        if name.endswith("running_var"):
            tensors[name].fill_(-1)
    torch.save(tensors, weights)
    before = sorted(weights.parent.iterdir())
    for more in ([], ["--pictures", "pictures/test/dark/0.png"]):
        assert "the model's outputs are NaN or infinite for some images" in evaluate(place, *more, code=2)
    assert sorted(weights.parent.iterdir()) == before


def test_pictures_of_mistakes_go_where_there_are_none(tmp_path):
    (tmp_path / "run.mistakes.png").touch()
    args = evaluate_script.get_args_parser().parse_args(["run.pt", "--output_dir", str(tmp_path)])
    data = SimpleNamespace(classes=["a", "b"], test_labels=[0, 1], test_files=None, test_images=None)
    predictions = Predictions(np.array([0, 1]), np.array([0, 1]), np.array([0.9, 0.8]))
    evaluate_script.print_and_write(args, {}, data, {}, predictions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.confusion.png", "run.evaluation.json"]


def test_the_folder_of_a_record_is_found_where_records_tell_it_from(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(evaluate_script, "ROOT", place / "clone")
    (place / "clone/resnext/data").mkdir(parents=True)
    assert evaluate_script.recorded_folder("pictures", "folder") == Path("pictures")
    assert evaluate_script.recorded_folder("resnext/data", "cifar10") == place / "clone/resnext/data"
    assert evaluate_script.recorded_folder("elsewhere", "cifar10") == Path("elsewhere")
    with pytest.raises(UserError, match="only the name of its image folder, elsewhere; give the path with"):
        evaluate_script.recorded_folder("elsewhere", "folder")
    assert evaluate_script.recorded_folder(None, None) == Path(evaluate_script.__file__).parent / "data"


def test_ones_own_pictures(place):
    Image.new("L", (90, 50), 250).save(place / "wide.pgm")
    lines = evaluate(place, "--pictures", "pictures/test/light/0.png", "wide.pgm").splitlines()
    values, labels = logits(place, "pictures/test/light/0.png").softmax(1)[0].topk(2)
    first, second = (
        f"{('dark', 'light')[label]} {100 * value:.1f} %" for value, label in zip(values, labels, strict=True)
    )
    assert lines[0] == f"pictures/test/light/0.png  {first}, {second}"
    assert lines[1].startswith("wide.pgm                   ")
    assert not list(place.glob("model_history/*evaluation*"))


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_weights_of_pytorch_cifar(place, prefix):
    path = place / f"model_history/{NAME}.pt"
    record = json.loads(path.with_suffix(".json").read_text())
    weights = {prefix + name: value for name, value in torch.load(path).items()}
    torch.save({"net": weights, "acc": 95.0, "epoch": 3}, path)
    path.with_suffix(".json").unlink()
    data = ["--dataset", "folder", "--data_dir", "pictures"]
    normalised = ["--mean", *record["data"]["mean"], "--std", *record["data"]["std"]]
    shown = evaluate(place, *data, *normalised)
    assert f"test accuracy {record['epochs'][-1]['test_acc']:.2f} % of 10 images\n" in shown
    assert "no record gives classes; using those of the 44 training images" in shown
    assert "no record gives classes, mean, std; using those of" in evaluate(place, *data)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("data", "std", [0, 0, 0]), ("data", "std", [1e-300, 1, 1]), ("data", "mean", [float("nan")] * 3),
     ("data", "mean", [0.5]), ("data", "mean", [9, 9, 9]), ("data", "size", 0), ("data", "size", 8_000_000),
     ("data", "classes", ["dark", "dark"]),
     ("data", "size", "32"), ("data", "classes", "01"), ("arguments", "batch_size", 0),
     ("arguments", "half_precision", "fp8"), ("layout", "form", "nothing")],
)  # fmt: skip
def test_a_record_that_makes_no_sense_is_refused_by_name(place, part, name, value):
    change_record(place, lambda record: record.setdefault(part, {}).update({name: value}))
    with pytest.raises(
        UserError, match=rf"{NAME}.json is not a record of a run \({part}.{name}.* is not .*\); correct"
    ):
        read_record(place / f"model_history/{NAME}.pt")


def test_weights_that_are_not_finite_are_refused(place):
    path = place / f"model_history/{NAME}.pt"
    weights = torch.load(path, weights_only=True)
    weights["bn1.weight"][0] = float("nan")
    torch.save(weights, path)
    with pytest.raises(UserError, match="the weights bn1.weight contain NaN or infinity"):
        load_model(path)
    os.mkfifo(place / "pipe.pt")
    with pytest.raises(UserError, match="pipe.pt has no ResNeXt-29 weights"):
        load_model(place / "pipe.pt")


def test_an_old_record_is_told_in_a_line(place):
    change_record(place, lambda record: record.pop("data"))
    shown = evaluate(place)
    assert shown.startswith(
        "no record gives classes, mean, std; using those of the 44 training images, at 32x32 pixels\n"
    )
    assert "as the run's record says" in shown


def test_another_data_set_is_told_or_refused(place):
    Image.new("RGB", (32, 32)).save(place / "pictures/test/dark/more.png")
    shown = evaluate(place)
    assert shown.startswith("this data set differs from the run's: 11 test images instead of 10\n")
    for split in ("train", "test"):
        (place / f"pictures/{split}/dark").rename(place / f"pictures/{split}/night")
    assert "2 classes (dark, light), not these 2: light, night" in evaluate(place, code=2)


def test_export(place):
    inputs = torch.from_numpy(np.array(Image.open(place / "pictures/test/light/0.png"))).permute(2, 0, 1)[None]
    expected = logits(place, "pictures/test/light/0.png")
    assert " by at most" in evaluate(place, "--export", "out.pt2")
    more = {"classes.json": ""}
    program = torch.export.load(place / "out.pt2", extra_files=more)
    torch.testing.assert_close(program.module()(inputs.expand(3, -1, -1, -1)), expected.expand(3, -1))
    assert json.loads(more["classes.json"]) == ["dark", "light"]
    if not importlib.util.find_spec("onnxscript"):
        assert "pip install onnx onnxscript" in evaluate(place, "--export", "out.onnx", code=2)
        return
    assert "logits [N, 2]" in evaluate(place, "--export", "out.onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    (outputs,) = onnxruntime.InferenceSession(place / "out.onnx").run(None, {"pictures": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), expected)


def test_dollars_in_the_names_of_classes_are_no_formula(tmp_path):
    classes = ["cost_$5_$10", "a $^$ b"]
    predictions = Predictions(np.array([0, 1]), np.array([1, 1]), np.array([0.9, 0.5]))
    figure = draw_matrix(predictions.confusion(2), classes, "run $_$")
    figure.savefig(tmp_path / "matrix.png")
    assert figure.axes[0].get_title() == r"run \$_\$"
    images = np.zeros((2, 8, 8, 3), np.uint8)
    draw_mistakes(np.array([0]), images, predictions, classes).savefig(tmp_path / "mistakes.png")


def test_tables():
    predictions = Predictions(np.array([0, 1, 1, 2, 0]), np.array([0, 0, 0, 2, 2]), np.array([0.9, 0.5, 0.8, 1.0, 0.8]))
    matrix = predictions.confusion(3)
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [1, 0, 1]]
    assert predictions.accuracy() == 40
    assert predictions.surest_mistakes(2).tolist() == [2, 4]
    lines = list(class_lines(matrix[[0, 2]][:, [0, 2]], ["ant", "bear"]))
    assert lines[1:] == ["ant           1  100.0%  -", "bear          2   50.0%  ant (1)"]
    lines = list(matrix_lines(matrix, ["ant", "bee", "bear"]))
    assert (lines[0], lines[3]) == ("true class   ant   bee  bear", "bear           1     0     1")
    lines = list(matrix_lines(matrix, ["class 1", "class 2", "class 3"]))
    assert (lines[0], lines[3]) == ("true class  1  2  3", "3. class 3  1  0  1")


def test_figures_show_shares_of_the_true_class_and_what_it_was_taken_for():
    predictions = Predictions(np.array([1, 1, 0, 1]), np.array([0, 0, 0, 1]), np.array([0.9, 0.8, 0.7, 0.6]))
    axes = draw_matrix(predictions.confusion(2), ["ant", "bee"], "run").axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert np.array(axes.images[0].get_array()).ravel() == pytest.approx([100 / 3, 200 / 3, 0, 100])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "1", (1, 0): "2", (1, 1): "1"}
    images = np.zeros((4, 8, 8, 3), np.uint8)
    mistakes = draw_mistakes(predictions.surest_mistakes(), images, predictions, ["ant", "bee"])
    assert [each.get_title() for each in mistakes.axes] == ["bee, 90.0 %\nis ant", "bee, 80.0 %\nis ant"]


def test_pictures_are_normalised_as_the_arguments_say(place):
    named = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    evaluate(place, "--mean", *named["mean"], "--std", *named["std"], "--output_dir", "own")
    wrong = json.loads((place / f"own/{NAME}.evaluation.json").read_text())["surest_and_wrong"]
    change_record(place, lambda record: record["data"].update(named))
    assert wrong
    expected = logits(place, *(f"pictures/{each['picture']}" for each in wrong)).softmax(1).amax(1)
    assert [each["probability"] for each in wrong] == pytest.approx(expected.tolist(), abs=1e-5)


def test_what_the_record_says_of_the_last_epoch_stands_beside_the_accuracy():
    predictions = Predictions(np.array([0, 1]), np.array([0, 0]), np.array([0.9, 0.8]))
    record = {"precision": "bf16", "machine": {"hardware": "a GPU"}}
    for told, words in (([75.0, 50.0], ", as the run's record says"),
                        ([50.0, 75.0], "; the run's record says 75.00 %, in bf16 on a GPU")):  # fmt: skip
        record["epochs"] = [{"test_acc": accuracy} for accuracy in told]
        assert evaluate_script.beside_record(record, {}, predictions) == words


def test_pictures_are_of_the_runs_size_and_in_its_precision(place, monkeypatch):
    monkeypatch.setattr(evaluate_script, "load_images", lambda *arguments: arguments)
    args = evaluate_script.get_args_parser().parse_args(["run.pt", "--data_dir", "there"])
    record = {"arguments": {"dataset": "folder"}, "data": {"size": 64}}
    assert evaluate_script.load_data(args, record) == ("folder", Path("there"), 64)
    change_record(place, lambda record: record["arguments"].update(half_precision="bfloat16"))
    evaluate(place)
    (each, *_) = json.loads((place / f"model_history/{NAME}.evaluation.json").read_text())["surest_and_wrong"]
    exact = float(logits(place, f"pictures/{each['picture']}").softmax(1).max())
    assert each["probability"] != pytest.approx(exact, abs=1e-6)
    assert each["probability"] == pytest.approx(exact, abs=0.05)


def test_an_export_whose_outputs_are_others_is_refused(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    known = evaluate_script.Known(["a", "b"], np.zeros(3, np.float32), np.ones(3, np.float32), 8)
    monkeypatch.setattr(torch.export, "export", lambda *arguments, **more: None)
    for wrong in (9.0, float("nan")):
        monkeypatch.setattr(export_model, "_to_torch", lambda *_, wrong=wrong: (b"", torch.full((3, 2), wrong)))
        with pytest.raises(UserError, match="out.pt2: its outputs differ from the model's by .*; nothing was written"):
            export_model.export(model, known, tmp_path / "out.pt2")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.pt2").write_text("precious")
    with pytest.raises(UserError, match=r"mine.pt2 already exists; choose another name"):
        export_model.export(model, known, tmp_path / "mine.pt2")
    assert (tmp_path / "mine.pt2").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "drawn"),
    [(os.fsdecode(b"o\xff$"), "o\\udcff\\$"), ("Bär 猫", "Bär \\u732b"), ("\x1b[31mred\t", "\\x1b[31mred\\t")],
)
def test_a_class_whose_name_no_font_draws_is_told_by_escapes(name, drawn, recwarn):
    assert literal(name) == drawn
    draw_matrix(np.eye(2, dtype=int), [name, "b"], name).canvas.draw()
    assert not recwarn
