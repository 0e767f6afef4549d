"""What the ResNeXt scripts share around their loops: arguments, run names, metrics, evaluation and records."""

import argparse
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from run_description import describe_effect, describe_prospects, describe_run

from harness import arguments, determinism, devices, distributed, resume, run_log, runs, tracing
from harness.endings import UserError
from harness.files import atomic_write
from harness.loading import EpochBatches
from harness.memory import keep_freed_memory
from harness.precision import add_half_precision, choose_precision
from harness.run_log import timing_figures
from harness.timing import nvtx_range
from image_loaders import DeviceImages, evaluation_batches, training_loader
from images import SIZE, load_images
from models.resnext import parse_name
from outputs import count_broken
from picture_files import LARGEST
from weights import check_start, read_record, start_from, weights_digest

SECONDS_BETWEEN_READS = 2.0  # Between reads of the running loss, which is on the device.

NOT_RESULTS = (*runs.NOT_RESULTS, "output_dir", "data_dir", "num_worker", "loader", "save_every", "keep_memory")


def get_args_parser(description, kind=arguments.OneLineParser):
    parser = kind(description=description)
    add = parser.add_argument
    add("--num_workers", "--num_worker", dest="num_worker", type=arguments.workers,
        default=arguments.default_workers(2),
        help="processes that load images; 0 loads them in the main process. By default at most the number of cores"
    )  # fmt: skip
    add_half_precision(parser, "autocast, in float16 with loss scaling when no type is named; on a CPU always in "
                       "bfloat16")  # fmt: skip
    add("--num_epoch", type=arguments.positive_int, default=200, help="passes over the training images")
    add("--batch_size", type=arguments.positive_int, default=128, help="images per step, over all processes")
    add("--lr", type=arguments.learning_rate, default=0.01, help="learning rate")
    add("--size", type=picture_size, default=SIZE, help="height and width that images of a folder are resized to")
    add("--model", type=model_name, default="resnext29_4x64d", help="resnext29_{cardinality}x{width}d")
    add("--dataset", choices=("cifar10", "digits", "folder"), default="cifar10",
        help="cifar10 is downloaded when absent; digits comes with scikit-learn; folder is train/<class>/* and "
             "test/<class>/* in --data_dir")  # fmt: skip
    add("--data_dir", default=str(Path(__file__).resolve().parent / "data"), help="where the images are")
    add("--loader", choices=("workers", "device"), default="workers",
        help="load in worker processes, or augment whole batches on the model's device")  # fmt: skip
    add("--true_fp32", **arguments.FLAG,
        help="disable TensorFloat-32, which GPUs since Ampere use for single precision")  # fmt: skip
    add("--seed", type=arguments.seed, default=0, help="seed of the weights, the order and the augmentation")
    add("--init", metavar="RUN.pt", help="start from these trained weights instead of random ones")
    add("--keep_memory", **arguments.FLAG,
        help="on a CPU, keep freed memory in the process; otherwise the system clears it again for each large tensor"
    )  # fmt: skip
    determinism.add_argument(parser)
    devices.add_arguments(parser)
    add("--output_dir", default="model_history", help="where the run's files go")
    resume.add_arguments(parser)
    add("--save_every", type=arguments.non_negative_float, default=5.0, metavar="MINUTES",
        help="how often to save what --resume needs; it is also saved on Ctrl-C or SIGTERM. With several processes it "
             "is saved only after an epoch")  # fmt: skip
    add("--max_steps", type=arguments.positive_int,
        help="stop after this many steps, for profiling; such a run writes only its timings")  # fmt: skip
    tracing.add_argument(parser)
    arguments.add_dry_run(parser)
    run_log.add_argument(parser)
    return parser


def model_name(text):
    try:
        parse_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def picture_size(text):
    """An argparse type: the height and width of an image, an int that the model can halve three times."""
    size = arguments.positive_int(text)
    if size % 8 or size > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8 up to {LARGEST}")
    return size


def loading_name(args):
    return "device" if args.loader == "device" else f"{args.num_worker}_worker"


def run_name(args, suffix=""):
    """The name of a run's files: workers and batch size, then whatever differs from the defaults.

    resnext_2_worker_128, resnext_0_worker_128_fp16, resnext_device_512_digits_checkpoint, ...
    """
    parts = [
        f"resnext_{loading_name(args)}_{args.batch_size}",
        args.model if args.model != "resnext29_4x64d" else None,
        args.dataset if args.dataset != "cifar10" else None,
        f"{args.size}px" if args.size != SIZE else None,
        "init" if args.init else None,
        {"float16": "fp16", "bfloat16": "bf16"}.get(args.half_precision),
        "fp32" if args.true_fp32 else None,
        f"seed{args.seed}" if args.seed else None,
        "deterministic" if args.deterministic else None,
        f"{args.max_steps}_steps" if args.max_steps else None,
    ]
    return "_".join(filter(None, parts)) + suffix


def load_data(args, world):
    """The ImageData that the arguments name."""
    with world.first_on_machine():
        return load_images(args.dataset, args.data_dir, args.size)


def load_parts(args, world, run, kind, **more):
    """(the ImageData that the arguments name, a model of class `kind` for it on this process's device); both are
    described in the record. more: arguments of `kind` besides its size and the number of classes."""
    if args.init and Path(args.init).resolve() == run.path(".pt").resolve():
        raise UserError(f"--init {args.init} is the file that this run writes; copy it, or choose another --output_dir")
    data = load_data(args, world)
    run.facts["data"] = data.state_dict()
    world.say(str(data))
    torch.manual_seed(args.seed)
    model = kind(*parse_name(args.model), num_classes=len(data.classes), **more)
    saved = run.saved_facts()
    if args.init and saved:  # The saved state has all weights.
        check_start(args.init, saved)
    elif args.init:
        run.facts["init"] = start_from(args.init, model, data.classes, world.say)
    run.facts["parameters"] = sum(weight.numel() for weight in model.parameters())
    return data, model.to(world.device)


def training_batches(args, world, data, run, **layout):
    """(the EpochBatches of this process, the loader that yields their images). The record says which loader was used,
    since --loader device falls back to workers if the device has too little memory.

    layout: memory_format and dtype of the images, if not the defaults.
    """
    batches = EpochBatches(len(data.train_labels), args.batch_size, args.seed, world.rank, world.size)
    loader = training_loader(args.loader, data, args.seed, batches, args.num_worker, world.device, world.say, **layout)
    run.facts["loading"] = "device" if isinstance(loader, DeviceImages) else "workers"
    return batches, loader


def conduct(args, experiment, suffix, train, **facts):
    """The main() of each script after parsing its arguments: join the other processes, choose the precision, lock the
    run's name, and train.

    experiment: the script's name in the record. suffix: the end of the run's name. train: the script's own function.
    facts: as for ImageRun.
    """
    determinism.apply(args)
    if args.keep_memory:
        keep_freed_memory()
    with distributed.world(devices.choose(args)) as world:
        world.check_divisible(args.batch_size)
        precision = choose_precision(args.half_precision, world.device, args.true_fp32, world.say)
        run = ImageRun(experiment, suffix, args, world, precision=precision.label, **facts)
        with run.lock():
            if not run.is_done():
                train(args, world, precision, run)


class Metrics(torch.nn.Module):
    """Loss and accuracy of an epoch, summed on the device so that nothing synchronizes until the epoch ends.

    totals: the sums of the losses, the correct predictions and the images.
    """

    def __init__(self, device):
        super().__init__()
        self.register_buffer("totals", torch.zeros(3, dtype=devices.widest_float(device), device=device))

    def add(self, loss, output, labels, weight=1.0):
        """loss: the batch's mean, a scalar; output: logits [n, classes]; labels: int64 [n]. Ignored if weight is 0."""
        if weight:
            correct = (output.detach().argmax(1) == labels).sum()
            count, wide = torch.full_like(correct, len(labels)), self.totals.dtype
            self.totals += torch.stack([loss.detach().to(wide) * count, correct.to(wide), count.to(wide)])

    def result(self, world=None):
        """(mean loss, accuracy in percent) over all processes, or of this one without a World. Synchronizes with the
        device."""
        loss, correct, count = (self.totals if world is None else world.sum(self.totals.clone())).tolist()
        return loss / max(count, 1), 100 * correct / max(count, 1)


def evaluate(model, data, precision, world, batch_size, stop, **layout):
    """Accuracy in percent on the test images, each counted once, in the precision and layout of training. NaN, which
    ends the run (`add_epoch`), if the model's outputs for some of them are not finite.

    layout: memory_format and dtype of the images, if not the defaults. The model is not compiled for evaluation: that
    would take longer than it saves. A StopRequest ends it early; the result is then None.
    """
    if stop:
        return None
    world.broadcast_buffers(model)
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=world.device)  # Correct and broken; read once, at the end.
    with nvtx_range("validation"), torch.inference_mode():
        for images, labels in evaluation_batches(data, batch_size, world.device, world.rank, world.size):
            if stop:
                break
            with precision.autocast():
                output = model(images.to(world.device, **layout))
            counts += torch.stack([(output.argmax(1) == labels).sum(), count_broken(output)])
    model.train()
    if stop:
        return None
    correct, broken = world.sum(counts).tolist()
    return math.nan if broken else 100 * correct / len(data.test_labels)


class ImageRun(runs.Run):
    """A Run in --output_dir that ends with the weights (.pt), the curves (.npz) and the record (.json)."""

    title = "training resnext"
    unit = "images"
    elsewhere = "--output_dir"
    opening, prospects = describe_run, describe_prospects

    def __init__(self, experiment, suffix, args, world, **more):
        if args.dataset == "folder":
            # Only its path identifies such a data set; a resumed run may still find it at another path.
            self.only_of_records = (*self.only_of_records, "data_dir")
        super().__init__(experiment, args.output_dir, run_name(args, suffix), args, world, NOT_RESULTS, **more)
        self.weights = self.results = self.path(".pt"), self.path(".npz")
        self._shown_at = 0.0  # When the progress bar's figures were last read.
        self.saves_within_epochs = world.size == 1  # Several processes each have their own sums until the epoch ends.

    def check_inputs(self):
        record = read_record(self.path(".pt"))
        if self.args.init:
            check_start(self.args.init, record)
        if self.args.dataset == "folder":  # The other data sets are the same everywhere, and may not be there any more.
            load_data(self.args, self.world).load_state_dict(record.get("data", {}))

    def other_states(self):
        """The states of runs that differ from this one only in how they load images."""
        before, after = self.name.split(loading_name(self.args), 1)
        alike = re.compile(rf"{before}(device|\d+_worker){re.escape(after)}")
        return [path for path in sorted(self.folder.glob("*.state")) if alike.fullmatch(path.stem)]

    def add_epoch(self, epoch, test_acc, evaluation_seconds):
        """Append an Epoch to the history; UserError if its loss, a weight, or the model's output is not finite."""
        loss, acc = self.state["metrics"].result(self.world)
        advice = "Use a smaller --lr, or bfloat16 or single precision instead of float16"
        self.check_finite(epoch, loss, advice, **{"the model's outputs for test images": test_acc})
        self.state["metrics"].totals.zero_()
        self.record_epoch(epoch, evaluation_seconds, loss=loss, acc=acc, test_acc=test_acc)
        # Before the state is saved, so that a resumed run keeps them.
        self.log.line(self.line())
        self.log.plot(self._figures(), epoch.number + 1)

    def _figures(self):
        """{name: float} of the latest epoch, for TensorBoard."""
        newest = self.history[-1]
        figures = {name: newest[name] for name in ("loss", "acc", "test_acc", "samples_per_second")}
        figures["rate"] = float(self.state["optimizer"].param_groups[0]["lr"])
        if "saved_activation_bytes" in self.facts:
            figures["memory/kept_MiB"] = self.facts["saved_activation_bytes"] / 2**20
        return figures | timing_figures(newest["timing"])

    def finish(self, model):
        """Write the weights, the curves and the record, each atomically. The state is deleted, or replaced by one from
        which a longer run can continue. A run that --max_steps ended writes nothing more here."""
        if self.stop.enough or not self.world.is_main:
            return
        # If this run is killed before it has a record, the state shows a later run that the weights are its own.
        if not (self.fixed_length and self.path(".state").exists()):
            self.save(self.args.num_epoch, 0)
        curves = {key: np.array([epoch[key] for epoch in self.history]) for key in ("loss", "acc", "test_acc")}
        with self.writing():
            with atomic_write(self.path(".pt")) as file:
                # On the CPU, so that the file also loads on a machine without this GPU.
                torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, file)
            with atomic_write(self.path(".npz")) as file:
                np.savez(file, **curves)
        self.facts["weights_digest"] = weights_digest(self.path(".pt"))  # So that the record shows whose it is.
        self.write_record()
        if self.fixed_length:
            self.drop_state()
        longer = "" if self.fixed_length else ", .state (for --resume with a larger --num_epoch)"
        logged = f"; {self.log_folder()} (log)" * self.args.log
        self.say(f"{self.path('.pt')} (weights), .npz (curves), .json (record){longer}{logged}")
        effect = describe_effect(self)
        if effect:
            self.say(effect)
        self.log.close()

    def progress_bar(self, epoch):
        """A progress bar that starts with the last epoch's test accuracy."""
        self._shown_at = time.perf_counter()
        bar = super().progress_bar(epoch)
        if not bar.disable:
            bar.set_postfix(self._last_test_acc())
        return bar

    def show_progress(self, bar):
        """Show the epoch's loss and accuracy so far, but only every few seconds: reading them waits for the device."""
        now = time.perf_counter()
        if bar.disable or now < self._shown_at + SECONDS_BETWEEN_READS:
            return
        self._shown_at = now
        loss, acc = self.state["metrics"].result()
        bar.set_postfix({"loss": f"{loss:.3f}", "acc": f"{acc:.2f} %"} | self._last_test_acc(), refresh=False)

    def _last_test_acc(self):
        return {"test_acc": f"{self.history[-1]['test_acc']:.2f} %"} if self.history else {}

    def line(self):
        """The latest epoch in one plain line."""
        epoch = self.history[-1]
        return (
            f"epoch {epoch['epoch']}/{self.args.num_epoch}: loss {epoch['loss']:.4f}, acc {epoch['acc']:.2f} %, "
            f"test acc {epoch['test_acc']:.2f} %, {epoch['timing']['seconds']:.1f} s, "
            f"{epoch['samples_per_second']:.0f} images/s"
        )
