#!/usr/bin/env python3
"""Stage 4 of 5: train a SimCLS scorer, an encoder that ranks candidate summaries of a document by quality.

    python3 main.py --cuda --gpuid 0 -l --dataset samples --model_type roberta-base
    python3 main.py --cuda --gpuid 0 -e --dataset samples --model_pt simcls_4_worker/scorer.bin

--dataset contains the sample folders train, val and test, made by preprocess.py or published. The weights, record and
log are written to ./cache/<run>/.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import torch
from data_utils import load_samples, training_batches
from model import load_scorer, read_description

from harness import determinism, devices, distributed, endings
from harness.arguments import given
from harness.endings import UserError
from harness.job import read_job
from harness.memory import SavedBytes
from harness.precision import choose_precision
from harness.timing import PhaseTimer
from pretrained.model_folders import half_precision_name
from scorer import short_attention
from scorer.combination import fit_best
from scorer.layer_plan import plan_memory
from scorer.metrics import Metrics, loss_of, validate
from scorer.optimization import Schedule, clip_gradients, seed_step
from scorer.scorer_arguments import cached_path, get_args_parser, starting_weights
from scorer.scorer_run import ScorerRun
from texts import provenance
from texts.samples import check_training

OF_EVALUATION = ("evaluate", "dataset", "model_pt", "cuda", "gpuid", "device")


def main():
    parser = get_args_parser(__doc__)
    args = parser.parse_args()
    device = choose_device(args)
    if args.evaluate:
        become_evaluation(args, device, given(parser, args))
    start_processes(args)
    determinism.apply(args)
    with distributed.world(device) as world:
        world.check_divisible(args.batch_size)
        scorer, encoding, description = load_model(args, world)
        half_precision = half_precision_name(args.half_precision, description["architecture"])
        with world.first_on_machine():
            made_of = check_training(Path(args.dataset), args.rouge_tokens, world.say)
        description["samples"], description["validation"] = made_of
        description["rouge_tokens"] = args.rouge_tokens
        if made_of[0].get("cand_num", 0) > args.max_num:
            world.say(f"warning: of {made_of[0]['cand_num']} candidates a document, --max_num {args.max_num} are used")
        # An argument, so that a run resumes only with the samples that it began with, and its record identifies them.
        args.samples_digest = provenance.digest(made_of)
        # No TensorFloat-32: here it would affect the matrix products, for which PyTorch leaves it off by default too.
        precision = choose_precision(half_precision, device, true_fp32=True, say=world.say)
        short_attention.prefer(scorer.encoder, device, precision.dtype)
        run = ScorerRun(args, world, precision=precision.label)
        # Scorers of which this is equal differ in nothing but the seed.
        description["training"] = provenance.digest(
            {name: run.arguments[name] for name in run.arguments.keys() - {"seed"}}
        )
        with run.lock():
            data = load_data(args, world, precision, encoding, description)
            run.facts["data_digest"] = provenance.digest([each.digest for each in data])
            if not run.is_done():
                train(args, world, precision, run, scorer, description, *data)


def train(args, world, precision, run, scorer, description, train_set, val_set):
    device = world.device
    parallel_scorer = world.wrap(plan_memory(scorer, train_set, args, world, precision, run))
    batches, loader = training_batches(args, world, train_set)
    optimizer = torch.optim.Adam([each for each in scorer.parameters() if each.requires_grad], fused=True)
    schedule = Schedule.of_run(args, optimizer, description["hidden_size"], batches.updates)
    scaler, metrics = precision.scaler, Metrics(device)
    phase, saved = PhaseTimer(device), SavedBytes(scorer)
    state = {"scorer": scorer, "optimizer": optimizer, "scaler": scaler, "metrics": metrics, "run": run}
    run.describe(scorer, description, schedule, len(val_set))
    for epoch in run.epochs(phase, batches, **state):
        for batch in epoch.steps(loader):  # The wait for a batch is the phase "data load".
            # --------------------------------------------------------------------- validation at intervals
            if run.validation_is_due(epoch):
                with phase("validation"):
                    result = validate(scorer, val_set, args, precision, world, run.stop)
                run.keep_within_epoch(epoch, result)
            # ----------------------------------------- the training step; --accumulate_step of them make an update
            seed_step(args.seed, epoch.number, epoch.step, world.rank)
            with phase("data copy"):
                batch = batch.to(device)
            if batches.starts_update(epoch.step):
                with phase("zero grad"):
                    optimizer.zero_grad(set_to_none=True)
            with phase("forward"), precision.autocast(), saved.first_time():
                parallel_scorer.require_backward_grad_sync = batches.ends_update(epoch.step)  # DDP: once per update.
                scores, gold_scores = parallel_scorer(batch)
                loss = loss_of(args, scores, gold_scores, batch)
            with phase("backward"):
                # An update's last batch may be smaller, or missing in some processes: the weights make the mean exact.
                scaler.scale(loss * epoch.weight).backward()
            if batches.ends_update(epoch.step):
                with phase("optimizer"):
                    scaler.unscale_(optimizer)
                    clip_gradients(scorer, args.grad_norm)
                    schedule.set()
                    scaler.step(optimizer)
                    scaler.update()
            metrics.add(loss, scores, batch, epoch.weight)  # On the device, without synchronising.
            run.note_saved(saved.bytes)
            run.report(epoch)
        epoch.end(validate(scorer, val_set, args, precision, world, run.stop))
    fit_best(run, scorer, description, val_set, args, precision, world)
    run.finish()


def load_model(args, world):
    """(scorer on its device, its TextEncoding, its description); sets the lengths in `args` to those in use."""
    weights = starting_weights(args)
    torch.manual_seed(args.seed)
    with world.first_on_machine():
        scorer, encoding, description = load_scorer(
            args.model_type, weights, args.total_len, args.max_len, args.dropout
        )
    before = (weights and read_description(weights)) or {}
    seen = [*before.get("earlier_samples", ()), before.get("samples"), before.get("validation")]
    description["earlier_samples"] = [made for made in seen if made]
    args.total_len, args.max_len = encoding.total_len, encoding.max_len
    if args.frozen_layers:
        scorer.freeze_layers(args.frozen_layers)
    return scorer.to(world.device), encoding, description


def load_data(args, world, precision, encoding, description):
    """(training SampleSet, validation SampleSet); sets `description["candidates"]` to the most of any document."""
    folder = Path(args.dataset)
    to_load = {"device_type": world.device.type, "dtype": precision.dtype, "say": world.say, "keep": not args.dry_run}
    with world.first_on_machine():
        train_set = load_samples(folder / "train", encoding, args.max_num, None, **to_load)
        val_set = load_samples(folder / "val", encoding, args.max_num, args.rouge_tokens, **to_load)
    if train_set.all_tied:
        raise UserError(
            f"{folder / 'train'}: in every document, all candidates have equal scores, so there is nothing to learn; "
            "generate more candidates or, if the texts are not in letters a-z, use preprocess.py --rouge_tokens"
        )
    description["candidates"] = train_set.most_candidates
    world.say(
        f"{len(train_set)} training and {len(val_set)} validation documents with up to {train_set.most_candidates} "
        f"candidates; documents are cut to {encoding.total_len} tokens, candidates to {encoding.max_len}"
    )
    return train_set, val_set


def choose_device(args):
    """The torch.device of this process; UserError for contradictory arguments or a GPU that does not exist."""
    if len(set(args.gpuid)) < len(args.gpuid):
        raise UserError(f"--gpuid {' '.join(map(str, args.gpuid))} names a GPU twice")
    job = read_job()
    processes, rank = job.local_size, job.local_rank
    if job.is_started and len(args.gpuid) not in (1, processes):
        raise UserError(f"--gpuid names {len(args.gpuid)} GPUs, but there are {processes} processes; leave it out")
    if args.device and args.cuda:
        raise UserError(f"--device {args.device} and --cuda both say where to train; leave one of them out")
    if not args.cuda:
        args.device = args.device or "cpu"
        return devices.choose(args)
    if not torch.cuda.is_available():
        raise UserError("--cuda: PyTorch finds no CUDA GPU on this machine; leave --cuda out to train on the CPU")
    # Under torchrun, processes take the GPUs in order unless --gpuid names several.
    gpus = args.gpuid if processes == 1 or len(args.gpuid) > 1 else range(processes)
    devices.set_threads(args)
    missing = [gpu for gpu in gpus if gpu >= torch.cuda.device_count()]
    if missing:
        raise UserError(f"--gpuid {missing[0]}: there is no such GPU; this machine has {torch.cuda.device_count()}")
    return torch.device("cuda", gpus[rank])


def become_evaluation(args, device, given):
    """For `-e`: replace this process by evaluate_model.py with the test samples and --model_pt. Warns of arguments in
    `given`, a list of names, that are only for training."""
    if not args.model_pt:
        raise UserError("-e evaluates trained weights; give them with --model_pt, such as run/scorer.bin")
    if read_job().is_started or len(args.gpuid) > 1:
        raise UserError("-e runs in a single process; start it without torchrun, with one --gpuid")
    command = [sys.executable, Path(__file__).resolve().with_name("evaluate_model.py")]
    command += ["--samples", Path(args.dataset) / "test", "--scorer_path", cached_path(args.model_pt)]
    command += ["--device", device]
    passed_on = ("threads", "model_type", "total_len", "max_len", "half_precision", "batch_size", "rouge_tokens")
    left_out = [f"--{name}" for name in given if name not in (*passed_on, *OF_EVALUATION)]
    if left_out:
        print(f"warning: -e ignores arguments of training: {', '.join(left_out)}", file=sys.stderr, flush=True)
    for name in passed_on:
        if getattr(args, name) is not None:
            command += [f"--{name}", getattr(args, name)]
    sys.stdout.flush()
    os.execv(sys.executable, list(map(str, command)))


def start_processes(args):
    """If --gpuid names several GPUs and torchrun is not running yet, replace this process by it, with one per GPU."""
    if len(args.gpuid) == 1 or read_job().is_started:
        return
    meeting = ["--standalone"] if args.port is None else ["--nnodes=1", f"--master_port={args.port}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc_per_node={len(args.gpuid)}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*torchrun, str(Path(__file__).resolve()), *sys.argv[1:]])


if __name__ == "__main__":
    endings.run(main)
