#!/usr/bin/env python3
"""Evaluate a trained ResNeXt: accuracy by class, confusion matrix and most confident mistakes.

    python3 evaluate.py model_history/resnext_2_worker_128.pt                              on the run's own test images
    python3 evaluate.py model_history/resnext_2_worker_128.pt --pictures cat.jpg dog.png             on your own images
    python3 evaluate.py model_history/resnext_2_worker_128.pt --export resnext.onnx                  for other programs

The record next to the .pt provides everything else. Without one, as with weights of pytorch-cifar, --dataset and
--data_dir name the data that the weights were trained on, and --mean and --std how its images were normalised.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import numpy as np
import torch

from confusion import WIDEST_TABLE, Predictions, class_lines, draw_matrix, draw_mistakes, matrix_lines
from export_model import export
from harness import devices, endings
from harness.arguments import OneLineParser, deviation, positive_int, share
from harness.endings import UserError, printable
from harness.files import ROOT, atomic_write, write_json
from harness.precision import choose_precision
from image_loaders import evaluation_batches, normalise
from images import SIZE, load_images
from layouts import Layout
from outputs import count_broken
from picture_files import read_picture
from weights import is_of_other_weights, load_model, read_record, warn_of_other_weights, weights_digest

FOREIGN = "the record beside the weights, which gave classes, mean, std and precision, is of other weights"


def get_args_parser():
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.pt", help="trained weights, as written by a run or by pytorch-cifar")
    add("--pictures", type=Path, nargs="+", metavar="FILE", help="classify only these image files")
    add("--export", type=Path, metavar="FILE", help="write the model to a .pt2 (torch.export) or .onnx file")
    add("--dataset", choices=("cifar10", "digits", "folder"), help="by default the run's")
    add("--data_dir", type=Path, help="where the images are; by default where the run's record says, below this "
        "folder or the repository")  # fmt: skip
    add("--mean", type=share, nargs=3, metavar="X", help="means of the channels in [0, 1]; by default the run's")
    add("--std", type=deviation, nargs=3, metavar="X",
        help="standard deviations of the channels in [0, 1]; by default the run's")  # fmt: skip
    add("--batch_size", type=positive_int, help="images at a time; by default the run's")
    add("--output_dir", type=Path, help="where the figures and numbers go; by default next to the weights")
    devices.add_arguments(parser)
    return parser


class Known(NamedTuple):
    """What the weights alone do not say: class names, mean and std (float32 [3]) of the channels in [0, 1], and the
    height and width of the images."""

    classes: list
    mean: np.ndarray
    std: np.ndarray
    size: int


def main():
    args = get_args_parser().parse_args()
    args.output_dir = args.output_dir or args.run.parent
    device = devices.choose(args)
    model, record = load_model(args.run), read_record(args.run)
    record["is_foreign"] = is_of_other_weights(record, args.run)
    if record["is_foreign"]:
        warn_of_other_weights(
            args.run,
            "its classes, mean, std and precision are used all the same; if they are others, move it away and name the "
            "data with --dataset and --data_dir",
        )
        record.pop("epochs", None)  # Their accuracy is not that of these weights.
    on_test_pictures = not (args.pictures or args.export)
    data = load_data(args, record) if on_test_pictures or missing_facts(args, record) else None
    if data is None and (args.dataset or args.data_dir):
        raise UserError(
            "--dataset and --data_dir are for test images, which --pictures and --export do not use; leave them out"
        )
    known = gather(args, record, data, len(model.linear.weight))
    if args.export:
        print(export(model, known, args.export, FOREIGN if record["is_foreign"] else None))
    settings = record.get("arguments", {})
    precision = choose_precision(settings.get("half_precision"), device, settings.get("true_fp32"))
    chosen = record.get("layout", {})  # Only resnext_fast.py chooses a layout.
    layout = Layout(chosen.get("channels_last", False), chosen.get("form", "groups"))
    layout.apply(model.to(device))
    if args.pictures:
        classify(args.pictures, model, known, precision, layout)
    if on_test_pictures:
        data.statistics = known.mean, known.std
        evaluated = what_is_evaluated(args, data, known)
        batches = evaluation_batches(data, args.batch_size or settings.get("batch_size", 128), device)
        print_and_write(args, record, data, evaluated, predict(model, batches, precision, layout))


# ----------------------------------------------------------------------------------- what the weights alone do not say


def missing_facts(args, record):
    """The names of the facts that neither the arguments nor the record provide."""
    facts = record.get("data", {})
    return [name for name in ("classes", "mean", "std") if getattr(args, name, None) is None and name not in facts]


def load_data(args, record):
    """The ImageData that the arguments name, else the record; UserError if neither does."""
    settings = record.get("arguments", {})
    dataset = args.dataset or settings.get("dataset")
    if dataset is None:
        raise UserError(
            f"no record {args.run.with_suffix('.json')} says what data the weights were trained on; name it with "
            "--dataset and --data_dir"
        )
    data_dir = args.data_dir or recorded_folder(settings.get("data_dir"), dataset)
    return load_images(dataset, data_dir, record.get("data", {}).get("size", SIZE))


def recorded_folder(name, dataset):
    """The Path of the data folder that a record calls `name`, given relative to the repository or by its last component
    only; by default that of CIFAR-10. UserError if a folder of images is missing."""
    if name is None:
        return Path(__file__).resolve().parent / "data"
    found = next((path for path in (Path(name), ROOT / name) if path.is_dir()), Path(name))
    if dataset == "folder" and not found.is_dir():
        raise UserError(
            f"the run's record gives only the name of its image folder, {name}; give the path with --data_dir"
        )
    return found


def gather(args, record, data, num_classes):
    """The Known from arguments and record; anything missing is taken from the ImageData `data`, with a message."""
    facts, lacks = record.get("data", {}), missing_facts(args, record)
    if lacks:
        mean, std = data.statistics
        facts = {"classes": data.classes, "mean": mean, "std": std, "size": data.size} | facts
        size = facts["size"]
        print(
            f"no record gives {', '.join(lacks)}; using those of the {len(data.train_labels)} training images, at "
            f"{size}x{size} pixels"
        )
    elif data and data.differs_from(facts):
        print(f"this data set differs from the run's: {data.differs_from(facts)}")
    classes = facts["classes"]
    for found in (classes, data.classes if data else classes):
        if len(found) != num_classes or found != classes:
            own = f" ({', '.join(classes[:10])})" * (len(classes) == num_classes)
            raise UserError(
                f"{args.run} distinguishes {num_classes} classes{own}, not these {len(found)}: "
                f"{', '.join(found[:10])}; name the images that it was trained on with --dataset and --data_dir"
            )
    mean, std = (np.array(value, np.float32) for value in (args.mean or facts["mean"], args.std or facts["std"]))
    return Known(classes, mean, std, facts.get("size", SIZE))


# ------------------------------------------------------------------------------------------------------- predictions


def classify(paths, model, known, precision, layout):
    """Print a line for each image: its file, the two most likely classes, and their probabilities."""
    device = model.linear.weight.device
    width = max(len(printable(str(path))) for path in paths)
    for path in paths:
        image = torch.from_numpy(read_picture(path, known.size)).permute(2, 0, 1)[None].to(device)
        batch = normalise(image, known.mean, known.std)
        with torch.inference_mode(), precision.autocast():
            output = checked(model(batch.contiguous(memory_format=layout.memory_format)))
        values, labels = output.float().softmax(1)[0].topk(min(2, len(known.classes)))
        names = (printable(known.classes[label]) for label in labels)
        guesses = (f"{name} {100 * value:.1f} %" for name, value in zip(names, values, strict=True))
        print(f"{printable(str(path)):{width}}  {', '.join(guesses)}")


def checked(output):
    """`output`, the logits of a batch; UserError if they are not finite, as probabilities and classes would then mean
    nothing."""
    if count_broken(output):
        raise UserError(
            "the model's outputs are NaN or infinite for some images: its weights are damaged, or overflow in the half "
            "precision that the run's record names"
        )
    return output


def predict(model, batches, precision, layout):
    """The Predictions for `batches` of (float32 [n, 3, H, W], int64 [n])."""
    parts = []
    for images, labels in batches:
        with torch.inference_mode(), precision.autocast():
            output = checked(model(images.contiguous(memory_format=layout.memory_format)))
        predicted = output.argmax(1)
        probabilities = output.float().softmax(1).gather(1, predicted[:, None])[:, 0]
        parts.append([each.cpu().numpy() for each in (predicted, labels, probabilities)])
    return Predictions(*map(np.concatenate, zip(*parts, strict=True)))


def what_is_evaluated(args, data, known):
    """What an evaluation evaluates, as its JSON says; UserError if it would replace an evaluation of something else."""
    evaluated = {"digest": data.digest, "mean": known.mean.tolist(), "std": known.std.tolist()}
    evaluated["weights"] = weights_digest(args.run)
    path = args.output_dir / f"{args.run.stem}.evaluation.json"
    try:
        there = json.loads(path.read_bytes())["data"]
    except FileNotFoundError:
        for figure in ("confusion", "mistakes"):
            if (drawn := path.with_name(f"{args.run.stem}.{figure}.png")).exists():
                raise UserError(
                    f"{drawn} already exists, without its {path.name}; move it away, or choose another --output_dir"
                ) from None
        return evaluated
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        there = None
    if there != evaluated:
        raise UserError(
            f"{path} already exists and is not of these weights and images with this --mean and --std; move it away, "
            "or choose another --output_dir"
        )
    return evaluated


def print_and_write(args, record, data, evaluated, predictions):
    """Print what the predictions for the test images of `data` show, and write it as figures and JSON."""
    matrix = predictions.confusion(len(data.classes))
    mistakes = predictions.surest_mistakes()
    files = data.test_files or [f"test image {number}" for number in range(len(data.test_labels))]
    accuracy = f"test accuracy {predictions.accuracy():.2f} % of {len(files)} images"
    print(f"{accuracy}{beside_record(record, evaluated, predictions)}\n")
    names = [printable(name) for name in data.classes]
    print(*class_lines(matrix, names), sep="\n")
    if len(names) <= WIDEST_TABLE:
        print("", *matrix_lines(matrix, names), sep="\n")
    wrong = [
        {
            "picture": files[index],
            "predicted": data.classes[predictions.predicted[index]],
            "probability": float(predictions.probabilities[index]),
            "class": data.classes[predictions.labels[index]],
        }
        for index in mistakes
    ]
    print("\nmost confident mistakes:" if wrong else "\nno image was misclassified")
    for each in wrong:
        guess, truth = printable(each["predicted"]), printable(each["class"])
        print(f"  {printable(str(each['picture']))}: {guess} {100 * each['probability']:.1f} %, is {truth}")
    by_class = {name: 100 * matrix[label, label] / matrix[label].sum() for label, name in enumerate(data.classes)}
    results = {
        "weights": args.run.name,
        "data": evaluated,
        **({"warning": FOREIGN} if record.get("is_foreign") else {}),
        "test_acc": predictions.accuracy(),
        "test_acc_by_class": by_class,
        "confusion": matrix.tolist(),
        "surest_and_wrong": wrong,
    }
    write_json(args.output_dir / f"{args.run.stem}.evaluation.json", results)
    figures = {"confusion": draw_matrix(matrix, data.classes, f"{args.run.stem}: {predictions.accuracy():.2f} %")}
    if wrong:
        figures["mistakes"] = draw_mistakes(mistakes, data.test_images, predictions, data.classes)
    else:  # From an earlier evaluation, perhaps in another precision.
        (args.output_dir / f"{args.run.stem}.mistakes.png").unlink(missing_ok=True)
    for name, figure in figures.items():
        with atomic_write(args.output_dir / f"{args.run.stem}.{name}.png") as file:
            figure.savefig(file, format="png", dpi=100)
    print(f"\nwritten: {args.output_dir / args.run.stem}.{{evaluation.json,{'.png,'.join(figures)}.png}}")


def beside_record(record, evaluated, predictions):
    """What the run's record says of the same accuracy, as text to append; "" if the record is of something else."""
    facts = record.get("data", {})
    if any(facts.get(name, value) != value for name, value in evaluated.items()):
        return ""
    recorded = [epoch["test_acc"] for epoch in record.get("epochs", []) if "test_acc" in epoch]
    if not recorded:
        return ""
    if recorded[-1] == predictions.accuracy():
        return ", as the run's record says"
    where = record.get("machine", {}).get("hardware", "unknown hardware")
    return f"; the run's record says {recorded[-1]:.2f} %, in {record.get('precision', 'unknown precision')} on {where}"


if __name__ == "__main__":
    endings.run(main)
