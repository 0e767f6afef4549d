"""What main.py has around its loop: arguments, schedule, metrics, validation. Its files are in scorer_run.py."""

import argparse
from pathlib import Path

import numpy as np
import torch
from data_utils import ROUGE, load_samples
from model import MARGIN, MAX_LEN, TOTAL_LEN, load_scorer, ranking_loss, read_description, score_samples

from harness import determinism
from harness.arguments import (
    HelpWithDefaults,
    OneLineParser,
    boolean,
    fraction,
    learning_rate,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed,
    workers,
)
from harness.endings import UserError
from harness.precision import half_precision_type
from harness.timing import nvtx_range
from texts.scoring import add_rouge_argument

CACHE = Path("cache")


FLAG = {"type": boolean, "nargs": "?", "const": True, "default": False}


def get_args_parser(description):
    parser = OneLineParser(description=description, formatter_class=HelpWithDefaults)
    add = parser.add_argument
    add("--dataset", default="samples", help="folder with the sample folders train, val and test")
    add("--model_type", help="encoder to start from: a folder, a name on the hub, or minilm (of "
        "requirements-encoder.txt); by default that of --model_pt, else roberta-base")  # fmt: skip
    add("--model_pt", help="weights to start from, or to evaluate: a path below ./cache, such as run/scorer.bin")
    add("-e", "--evaluate", action="store_true", help="score the test samples by --model_pt instead of training")
    add("-l", "--log", action="store_true", help="write log.txt and TensorBoard events beside the weights")
    add("--run_name", type=run_name_type, help="folder below ./cache; by default named by the settings")
    add("--resume", **FLAG, help="go on where an interrupted run with the same arguments stopped")
    add("--max_steps", type=positive_int, help="stop after so many steps, for profiling; writes the timings alone, "
        "below a name that ends with _{max_steps}_steps")  # fmt: skip
    add("--seed", type=seed, default=0, help=" ")
    add_machine_arguments(parser.add_argument_group("machine"))
    add_learning_arguments(parser.add_argument_group("learning"))
    add_loss_arguments(parser.add_argument_group("loss"))
    add_data_arguments(parser.add_argument_group("lengths, in tokens, and counts"))
    progress = parser.add_argument_group("progress")
    progress.add_argument(
        "--eval_freq", type=positive_int, default=1000, help="updates between validations, besides each epoch's end"
    )
    return parser


def add_machine_arguments(group):
    add = group.add_argument
    add("--cuda", action="store_true", help="train on GPUs")
    add("--gpuid", type=non_negative_int, nargs="+", default=[0],
        help="numbers of the GPUs, one process each; without --cuda as many processes on the CPU")  # fmt: skip
    add("-p", "--port", type=positive_int, help="TCP port at which the processes meet; by default a free one")
    add("--num_workers", type=workers, default=4, help="processes that make batches; 0 makes them in this one")
    add("--half_precision", type=half_precision_type, nargs="?", const="float16", metavar="float16|bfloat16",
        help="autocast, in float16 with loss scaling when no type is named; on a CPU always in bfloat16")  # fmt: skip
    add("--use_checkpoint", **FLAG, help="recompute the activations of each encoder layer in backward")
    determinism.add_argument(group)


def add_learning_arguments(group):
    add = group.add_argument
    add("--num_epoch", type=positive_int, default=5, help=" ")
    add("--batch_size", type=positive_int, default=8, help="documents a step, over all processes")
    add("--accumulate_step", type=positive_int, default=2, help="steps whose gradients make one update")
    add("--lr", type=learning_rate, help="peak learning rate of Adam; by default 3e-5 for an encoder of width 768, "
        "more for a narrower one")  # fmt: skip
    add("--warmup", type=fraction, default=0.1, help="share of the updates in which the rate rises to its peak, from "
        "which it falls to 0")  # fmt: skip
    add("--dropout", type=dropout_type, default=0.0, help="of the encoder; it blurs differences as small as the margin")
    add("--grad_norm", type=non_negative_float, default=1.0, help="clip gradients to this norm; 0 does not clip")


def add_loss_arguments(group):
    add = group.add_argument
    add("--margin", type=positive_float, default=MARGIN, help="score difference of candidates that are neighbours in "
        "ROUGE")  # fmt: skip
    add("--gold_margin", type=non_negative_float, default=0.0, help="how far the reference has to score above "
        "candidates")  # fmt: skip
    add("--gold_weight", type=non_negative_float, default=1.0, help="weight of the reference's part")


def add_data_arguments(group):
    add = group.add_argument
    add("--total_len", type=positive_int, help="of a document; longer ones are cut; by default as in the training of "
        f"--model_pt, else {TOTAL_LEN}")  # fmt: skip
    add("--max_len", type=positive_int, help="of a candidate or a reference; longer ones are cut; by default as in the "
        f"training of --model_pt, else {MAX_LEN}")  # fmt: skip
    add("--max_num", type=positive_int, default=16, help="candidates a document, the first ones")
    add_rouge_argument(group)


def dropout_type(text):
    value = non_negative_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 1")
    return value


def run_name_type(text):
    if Path(text).name != text or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain folder name")
    return text


def run_name(args):
    """The name of a run's folder and files: --run_name, or the workers and whatever of these is asked for; then the
    steps of --max_steps, so that profiling never takes the name of a run that is trained to its end.

    simcls_4_worker, simcls_0_worker_fp16_checkpoint, mine_100_steps, ...
    """
    name = args.run_name or name_by_settings(args)
    return f"{name}_{args.max_steps}_steps" if args.max_steps else name


def name_by_settings(args):
    parts = [f"simcls_{args.num_workers}_worker"]
    if args.half_precision:
        parts.append({"float16": "fp16", "bfloat16": "bf16"}[args.half_precision])
    if args.use_checkpoint:
        parts.append("checkpoint")
    if args.seed:
        parts.append(f"seed{args.seed}")
    if args.deterministic:
        parts.append("deterministic")
    return "_".join(parts)


def cached_path(name):
    """The path of `--model_pt name` below ./cache; UserError when it lies elsewhere or is no file."""
    path = CACHE / name
    if not path.resolve().is_relative_to(CACHE.resolve()):
        raise UserError(
            f"--model_pt {name} leaves the folder {CACHE}; give a path relative to it, such as run/scorer.bin"
        )
    if not path.is_file():
        there = sorted(str(path.relative_to(CACHE)) for path in CACHE.glob("*/*.bin"))
        raise UserError(f"there are no weights {path}; below {CACHE} there are: {', '.join(there) or 'none'}")
    return path


def fill_in_lengths(args):
    """Set --total_len and --max_len, where they are not given, to those of --model_pt's training, else to the defaults;
    so that a record, and the state to resume from, tell those that were used."""
    trained = (args.model_pt and read_description(cached_path(args.model_pt))) or {}
    args.total_len = args.total_len or trained.get("total_len", TOTAL_LEN)
    args.max_len = args.max_len or trained.get("max_len", MAX_LEN)


def default_rate(width):
    """A peak learning rate for an encoder of `width`: 3e-5 for a base model, more for a smaller one."""
    return 3e-5 * (768 / width) ** 1.5


class Schedule:
    """The learning rate: linear to `peak` in the first `warmup` of `updates`, then linear to 0.

    It goes by the updates that the optimizer has made, as its own state counts them: one that a GradScaler skipped
    does not count. Both stay on the device, so that nothing waits for it. optimizer: with fused=True.
    """

    def __init__(self, optimizer, peak, warmup, updates):
        self.optimizer, self.peak, self.warmup, self.updates = optimizer, peak, warmup, updates
        self._parameter = optimizer.param_groups[0]["params"][0]
        self.rate = torch.zeros((), device=self._parameter.device)

    @classmethod
    def of_run(cls, args, optimizer, width, updates_an_epoch):
        """That of a run's arguments, for an encoder of `width`."""
        updates = args.num_epoch * updates_an_epoch
        return cls(optimizer, args.lr or default_rate(width), max(1, round(args.warmup * updates)), updates)

    def set(self):
        """Give the optimizer the rate of its next update."""
        made = self.optimizer.state[self._parameter].get("step", torch.zeros_like(self.rate))
        falling = (self.updates - made) / max(1, self.updates - self.warmup)
        self.rate = self.peak * torch.minimum((made + 1) / self.warmup, falling).clamp(0, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


def seed_step(seed, epoch, step, rank):
    """Make a step's dropout a function of these alone, so that a resumed run needs no process's random state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0]))


def clip_gradients(model, norm):
    """Scale the gradients down to the norm `norm` when theirs is higher; 0 leaves them alone."""
    if norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)


class Metrics:
    """Sums over the documents of an epoch, and of a report, on the device: nothing waits for them until one ends."""

    def __init__(self, device):
        # [epoch, report] x [documents, loss, spread of the scores]
        self.totals = torch.zeros(2, 3, dtype=torch.float64, device=device)
        self._last = None

    @torch.no_grad()
    def add(self, loss, scores, batch, weight):
        """loss: the batch's mean, a scalar; scores: of its candidates, float [documents, candidates]. weight: 0 leaves
        the batch out."""
        self._last = batch
        if not weight:
            return
        highest = scores.masked_fill(~batch.present, -2).amax(1)
        lowest = scores.masked_fill(~batch.present, 2).amin(1)
        means = torch.stack([torch.ones_like(loss), loss, (highest - lowest).mean()])
        self.totals += len(scores) * means.double()

    def epoch_loss(self, world):
        """The mean loss of the epoch over all processes; the epoch's sums begin anew."""
        return self._take(0, world)[0]

    def report(self, world):
        """(loss, spread) since the last report, the spread being the mean over documents of highest less lowest score;
        the report's sums begin anew."""
        return self._take(1, world)

    def flat_loss(self, args):
        """What the loss of this process's last batch would be if all scores were equal."""
        zeros = torch.zeros_like(self._last.rouge)
        return float(loss_of(args, zeros, zeros[:, 0], self._last))

    def finite(self, world):
        """Whether no loss of the epoch so far was NaN or infinite in any process."""
        return bool(world.sum(self.totals.clone()).isfinite().all())

    def _take(self, row, world):
        documents, *sums = world.sum(self.totals[row].clone()).tolist()
        self.totals[row] = 0
        return [value / documents for value in sums]

    def gather(self, world):
        """Move the sums of all processes to the first one, whose state is what is saved."""
        totals = world.sum(self.totals.clone())
        self.totals.copy_(totals if world.is_main else torch.zeros_like(totals))

    def state_dict(self):
        return {"totals": self.totals}

    def load_state_dict(self, state):
        self.totals.copy_(state["totals"])


def validate(scorer, samples, args, precision, world, stop=None):
    """The loss, and the mean ROUGE of the candidates that the scorer chooses: {"val_loss", "val_rouge1", ...}.

    Each process scores its share of the SampleSet `samples`, every sample once. A stop request ends it early, with
    None.
    """
    numbers = np.argsort(samples.document_lengths, kind="stable")[world.rank :: world.size]
    losses, chosen = torch.zeros((), dtype=torch.float64, device=world.device), []
    with nvtx_range("validation"):
        batches = score_samples(scorer, samples, numbers, 2 * args.batch_size, world.device, precision)
        for part, batch, scores, gold_scores in batches:
            if stop:
                batches.close()
                return None
            losses += len(part) * loss_of(args, scores, gold_scores, batch).double()
            chosen.append(scores.masked_fill(~batch.present, -2).argmax(1))
        chosen = torch.cat(chosen).tolist() if chosen else []
    figures = [samples.rouge(number)[choice] for number, choice in zip(numbers, chosen, strict=True)]
    rouge = np.sum(figures, axis=0, dtype=np.float64) if figures else np.zeros(len(ROUGE))
    totals = torch.tensor([len(numbers), losses.item(), *rouge], dtype=torch.float64, device=world.device)
    count, *sums = world.sum(totals).tolist()
    return {f"val_{name}": value / count for name, value in zip(("loss", *ROUGE), sums, strict=True)}


def evaluate(args, world, precision):
    """Print the ROUGE on the test samples of the candidates that --model_pt chooses, of the first and of the best."""
    if not args.model_pt:
        raise UserError("-e evaluates trained weights: name them by --model_pt, such as run/scorer.bin")
    with world.first_on_machine():
        scorer, encoding, _ = load_scorer(args.model_type, cached_path(args.model_pt), args.total_len, args.max_len)
        samples = load_samples(
            Path(args.dataset) / "test", encoding, args.max_num, args.rouge_tokens, world.device.type, world.say
        )
    result = validate(scorer.to(world.device), samples, args, precision, world)
    every = [samples.rouge(number) for number in range(len(samples))]
    rows = {
        "first candidate": np.mean([rouge[0] for rouge in every], axis=0),
        "SimCLS": [result[f"val_{name}"] for name in ROUGE],
        "best candidate": np.mean([rouge[rouge.mean(1).argmax()] for rouge in every], axis=0),
    }
    world.say(f"{args.dataset}/test: {len(samples)} documents, loss {result['val_loss']:.4f}")
    for name, figures in rows.items():
        world.say(
            f"{name:<16}" + "".join(f"  {rouge} {100 * value:.2f}" for rouge, value in zip(ROUGE, figures, strict=True))
        )


def loss_of(args, scores, gold_scores, batch):
    """The ranking loss of a batch with the loss arguments of the run."""
    return ranking_loss(
        scores, gold_scores, batch.rouge, batch.present, args.margin, args.gold_margin, args.gold_weight
    )
