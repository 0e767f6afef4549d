"""The arguments of main.py, and the names and paths that follow from them."""

import argparse
from pathlib import Path

from model import MARGIN, MAX_LEN, TOTAL_LEN

from harness import arguments, determinism, devices, resume, run_log, tracing
from harness.endings import UserError
from harness.precision import add_half_precision
from texts.rouge_scores import add_rouge_argument

CACHE = Path("cache")


def get_args_parser(description):
    parser = arguments.OneLineParser(description=description)
    add = parser.add_argument
    add("--dataset", default="samples", help="folder that contains the sample folders train, val and test")
    add("--model_type", help="encoder to start from: folder, name on the hub, or minilm (from "
        "requirements-encoder.txt); by default that of --model_pt, else roberta-base")  # fmt: skip
    add("--model_pt", help="weights to start from, or to evaluate: a path below ./cache, such as run/scorer.bin")
    add("-e", "--evaluate", action="store_true", help="run evaluate_model.py on the test samples with --model_pt")
    run_log.add_argument(parser)
    add("--run_name", type=run_name_type, help="folder below ./cache; by default named by the settings")
    resume.add_arguments(parser)
    add("--max_steps", type=arguments.positive_int,
        help="stop after this many steps, for profiling; writes only the timings, "
             "under a name that ends with _{max_steps}_steps")  # fmt: skip
    tracing.add_argument(parser)
    arguments.add_dry_run(parser)
    add("--seed", type=arguments.seed, default=0, help="seed of the weights, sample order and dropout")

    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--cuda", action="store_true", help="train on GPUs")
    add("--gpuid", type=arguments.non_negative_int, nargs="+", default=[0],
        help="numbers of the GPUs, one process each; without --cuda, as many processes on the CPU")  # fmt: skip
    add("-p", "--port", type=port_type, help="TCP port for the processes to connect; by default a free one")
    add("--num_workers", "--num_worker", type=arguments.workers, default=arguments.default_workers(4),
        help="processes that make batches; 0: the training process does. By default 4, or the number of cores if "
             "smaller; it is part of the run's name")  # fmt: skip
    add_half_precision(group, "autocast, in float16 with loss scaling when no type is named; on a CPU, and for an "
                       "encoder of the T5 family, in bfloat16", unnamed="auto")  # fmt: skip
    how = group.add_mutually_exclusive_group()
    how.add_argument("--use_checkpoint", "--gradient_checkpointing", **arguments.FLAG,
        help="recompute the activations of each encoder layer in backward")  # fmt: skip
    how.add_argument("--memory_budget", type=arguments.positive_share, metavar="SHARE",
        help="recompute the cheapest parts of the encoder's layers, so that the peak is at most this share of that "
             "without. The peak: the most bytes of activations and their gradients at any time")  # fmt: skip
    determinism.add_argument(group)
    devices.add_arguments(group, default="the CPU, or with --cuda the GPUs of --gpuid")

    add = parser.add_argument_group("learning").add_argument
    add("--num_epoch", type=arguments.positive_int, default=5, help="passes over the training documents")
    add("--batch_size", type=arguments.positive_int, default=8, help="documents per step, over all processes")
    add("--accumulate_step", type=arguments.positive_int, default=2, help="steps whose gradients make one update")
    add("--lr", type=arguments.learning_rate,
        help="peak learning rate of Adam; by default 3e-5 for an encoder of width 768, "
             "more for a narrower one")  # fmt: skip
    add("--warmup", type=arguments.positive_share, default=0.1,
        help="share of the updates in which the learning rate rises to its peak; then it falls to 0")  # fmt: skip
    add("--dropout", type=arguments.share_below_one, default=0.0,
        help="dropout of the encoder; it blurs differences as small as the margin")  # fmt: skip
    add("--frozen_layers", type=arguments.non_negative_int, default=0,
        help="freeze this many of the encoder's lowest layers, and its embeddings: "
             "steps take less time, and less is kept for backward")  # fmt: skip
    add("--grad_norm", type=arguments.non_negative_float, default=1.0,
        help="clip gradients to this norm; 0: no clipping")  # fmt: skip

    add = parser.add_argument_group("loss").add_argument
    add("--margin", type=arguments.positive_float, default=MARGIN,
        help="score margin between candidates that are neighbours in the ROUGE ranking")  # fmt: skip
    add("--gold_margin", type=arguments.non_negative_float, default=0.0,
        help="score margin of the reference above the candidates")  # fmt: skip
    add("--gold_weight", type=arguments.non_negative_float, default=1.0, help="weight of the reference's loss")

    group = parser.add_argument_group("lengths, in tokens, and counts")
    add = group.add_argument
    add("--total_len", type=arguments.positive_int,
        help="maximum of a document; longer ones are cut; by default as in the training of "
             f"--model_pt, else {TOTAL_LEN}")  # fmt: skip
    add("--max_len", type=arguments.positive_int,
        help="maximum of a candidate or reference; longer ones are cut; by default as in the "
             f"training of --model_pt, else {MAX_LEN}")  # fmt: skip
    add("--max_num", type=arguments.positive_int, default=16,
        help="candidates used per document (the first ones)")  # fmt: skip
    add_rouge_argument(group)

    add = parser.add_argument_group("progress").add_argument
    add("--eval_freq", type=arguments.positive_int, default=1000,
        help="updates between validations; each epoch's end has one, too")  # fmt: skip
    return parser


def port_type(text):
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a TCP port, a number from 1 to 65535")
    return int(text)


def run_name_type(text):
    if Path(text).name != text or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain folder name")
    return text


def run_name(args):
    """The name of a run's folder and files: --run_name, or one made from the workers and the settings below, plus the
    steps of --max_steps, so that profiling never takes the name of a complete run.

    simcls_4_worker, simcls_0_worker_fp16_checkpoint, mine_100_steps, ...
    """
    parts = [
        f"simcls_{args.num_workers}_worker",
        {"auto": "fp16", "float16": "fp16", "bfloat16": "bf16"}.get(args.half_precision),
        f"frozen{args.frozen_layers}" if args.frozen_layers else None,
        "checkpoint" if args.use_checkpoint else None,
        f"budget{args.memory_budget:g}" if args.memory_budget else None,
        f"seed{args.seed}" if args.seed else None,
        "deterministic" if args.deterministic else None,
    ]
    cut_short = f"{args.max_steps}_steps" if args.max_steps else None
    return "_".join(filter(None, [*([args.run_name] if args.run_name else parts), cut_short]))


def starting_weights(args):
    """The path of --model_pt, or None if not given; UserError if the run would replace that file."""
    path = args.model_pt and cached_path(args.model_pt)
    if path and path.resolve().is_relative_to((CACHE / run_name(args)).resolve()):
        raise UserError(f"--model_pt {args.model_pt} is in this run's own folder; choose another --run_name")
    return path


def cached_path(name):
    """The path of `--model_pt name` below ./cache; UserError if it is elsewhere or not a file."""
    path = CACHE / name
    if not path.resolve().is_relative_to(CACHE.resolve()):
        raise UserError(
            f"--model_pt {name} is outside the folder {CACHE}; give a path relative to it, such as run/scorer.bin"
        )
    if not path.is_file():
        there = sorted(str(path.relative_to(CACHE)) for path in CACHE.glob("*/*.bin"))
        raise UserError(f"there is no file {path}; weights in {CACHE}: {', '.join(there) or 'none'}")
    return path
