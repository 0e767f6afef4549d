#!/usr/bin/env python3
"""Besides the stages: fine-tune a generator so that its better candidates get higher likelihoods.

    python3 brio.py --generator_name models/t5_covid --dataset samples --save_dir models/t5_covid_brio

BRIO (Liu et al. 2022, "BRIO: Bringing Order to Abstractive Summarization"): the generator is its own scorer. The score
of a summary is its log-probability divided by tokens ** length_penalty. The loss is SimCLS's ranking loss of these
scores plus the cross-entropy of the reference, without which the generator would forget how to write.

--dataset contains the sample folders train and val that preprocess.py made from this generator's candidates. Before the
first epoch and after each, the generator summarises the validation documents by beam search. --save_dir gets the model
of the epoch with the best mean of ROUGE-1, -2 and -Lsum in `from_pretrained` form, and `brio.json`, the record of the
run. The result is a generator like any other, for gen_candidate.py and evaluate_model.py; by default, its searches use
the --length_penalty of the training.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import torch
from data_utils import training_batches
from model import ranking_loss

from harness import arguments, determinism, devices, distributed, endings, resume, tracing
from harness.endings import UserError
from harness.memory import SavedBytes
from harness.precision import add_half_precision, choose_precision
from harness.timing import PhaseTimer
from pretrained.model_folders import check_apart, check_lengths
from scorer.optimization import Schedule, clip_gradients, seed_step
from search.generator import check_generation, is_of, load_generator, own_length, own_source_length
from texts import provenance
from texts.rouge_scores import add_rouge_argument
from texts.samples import check_training, read_sample, sample_files
from training.ranked_generator import BrioRun, Means, RankedGenerator, RankedSamples, validate


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--generator_name", required=True, help="generator to start from: folder, or name on the hub")
    add("--dataset", default="samples", help="folder that contains the sample folders train and val")
    add("--save_dir", required=True, help="folder for the fine-tuned generator")
    resume.add_arguments(parser)
    add(
        "--max_steps",
        type=arguments.positive_int,
        help="profile: stop after this many steps and keep no generator, only the record brio_{max_steps}_steps.json",
    )
    add("--seed", type=arguments.seed, default=0, help="seed of the sample order and dropout")
    determinism.add_argument(parser)
    devices.add_arguments(parser)
    tracing.add_argument(parser)
    add("--num_workers", "--num_worker", type=arguments.workers, default=1,
        help="processes that make batches; 0: the main one")  # fmt: skip
    add_half_precision(parser, "autocast, in bfloat16 when no type is named, since T5 overflows in float16",
                       unnamed="bfloat16")  # fmt: skip

    add = parser.add_argument_group("learning").add_argument
    add("--num_epoch", type=arguments.positive_int, default=2, help="passes over the training documents")
    add("--batch_size", type=arguments.positive_int, default=4, help="documents per step, over all processes")
    add("--accumulate_step", type=arguments.positive_int, default=2, help="steps whose gradients make one update")
    add("--lr", type=arguments.learning_rate, default=1e-4, help="peak learning rate of Adam")
    add("--warmup", type=arguments.positive_share, default=0.1, help="share of the updates in which the rate rises")
    add("--grad_norm", type=arguments.non_negative_float, default=1.0, help="clip gradients to this norm; 0: never")
    add("--rank_weight", type=arguments.non_negative_float, default=1.0, help="weight of the ranking loss")
    add("--mle_weight", type=arguments.non_negative_float, default=0.1, help="weight of the reference's cross-entropy")
    add("--margin", type=arguments.positive_float, default=0.01, help="score margin of neighbours in ROUGE")
    add("--length_penalty", type=arguments.exponent,
        help="exponent of the number of tokens by which a log-probability is divided *")  # fmt: skip

    lengths = parser.add_argument_group("lengths, in tokens, and counts; defaults marked * are the generator's own")
    add = lengths.add_argument
    add("--max_source_length", type=arguments.positive_int, help="maximum of a document; longer ones are cut *")
    add("--max_target_length", type=arguments.positive_int, help="maximum of a summary; longer ones are cut *")
    add("--num_cands", type=arguments.positive_int, default=16,
        help="candidates used per document (the first ones), and beams of the validation's search")  # fmt: skip
    add_rouge_argument(lengths)
    return parser


def main():
    args = get_args_parser().parse_args()
    if not (args.rank_weight or args.mle_weight):
        raise UserError("--rank_weight 0 and --mle_weight 0 leave nothing to learn; set one of them above 0")
    check_apart(args.save_dir, args.generator_name)
    determinism.apply(args)
    with distributed.world(devices.choose(args)) as world:
        world.check_divisible(args.batch_size)
        # No TensorFloat-32: here it would affect the matrix products, for which PyTorch leaves it off by default too.
        precision = choose_precision(args.half_precision, world.device, true_fp32=True, say=world.say)
        with world.first_on_machine():
            made_of = check_training(Path(args.dataset), args.rouge_tokens, world.say)
            args.samples_digest = provenance.digest(made_of)  # A run resumes only with these.
            model, tokenizer = load_own_generator(args, made_of, world)
        run = BrioRun(args, world, precision=precision.label)
        with run.lock():
            data = load_data(args, tokenizer, run)
            if not run.is_done():
                train(args, world, precision, run, RankedGenerator(model, tokenizer, args.length_penalty), *data)


def train(args, world, precision, run, ranked, train_set, val_set):
    device = world.device
    ranked.train().to(device)
    parallel = world.wrap(ranked)
    batches, loader = training_batches(args, world, train_set)
    optimizer = torch.optim.Adam(ranked.parameters(), fused=True)
    schedule = Schedule.of_run(args, optimizer, None, batches.updates)
    scaler, means = precision.scaler, Means(device)
    phase, saved = PhaseTimer(device), SavedBytes(ranked)
    state = {"ranked": ranked, "optimizer": optimizer, "scaler": scaler, "means": means}

    for epoch in run.epochs(phase, batches, **state):
        if epoch.number == epoch.done == 0 and not args.max_steps:
            run.begin(epoch, validate(ranked, val_set, args, world, run.stop))
        # ------------------------------------------------------------------------------------ the training step
        for batch in epoch.steps(loader):  # The wait for a batch is the phase "data load".
            seed_step(args.seed, epoch.number, epoch.step, world.rank)  # For dropout.
            with phase("data copy"):
                batch = batch.to(device)
            if batches.starts_update(epoch.step):
                with phase("zero grad"):
                    optimizer.zero_grad(set_to_none=True)
            with phase("forward"), precision.autocast(), saved.first_time():
                parallel.require_backward_grad_sync = batches.ends_update(epoch.step)  # DDP: once per update.
                scores, gold_scores, likelihood = parallel(batch)
                ranking = ranking_loss(scores, gold_scores, batch.rouge, batch.present, args.margin, gold_weight=0)
                loss = args.rank_weight * ranking + args.mle_weight * likelihood
            with phase("backward"):
                scaler.scale(loss * epoch.weight).backward()
            if batches.ends_update(epoch.step):
                with phase("optimizer"):
                    scaler.unscale_(optimizer)
                    clip_gradients(ranked, args.grad_norm)
                    schedule.set()
                    scaler.step(optimizer)
                    scaler.update()
            means.add(epoch.weight, len(scores), loss, ranking, likelihood)  # On the device, without synchronising.
            run.note_saved(saved.bytes)
        # ---------------------------------------------------------------------------------------------------------
        epoch.end(validate(ranked, val_set, args, world, run.stop))
    run.finish()


def load_own_generator(args, made_of, world):
    """(model, tokenizer); sets the lengths and the length penalty in `args` to those in use.

    made_of: the provenance of the samples; warns if they are from another generator. UserError for a model that this
    script cannot train.
    """
    model, tokenizer = load_generator(args.generator_name)
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise UserError(f"--generator_name {args.generator_name}: {model.config.model_type} models have no method to "
                        "shift summaries, which this script needs; choose another")  # fmt: skip
    if not all(is_of(model, tokenizer, made) for made in made_of):
        world.say(
            f"warning: the candidates in {args.dataset} were made with another generator than {args.generator_name}; "
            "BRIO is meant for a generator's own candidates"
        )
    config = model.generation_config
    args.max_source_length = args.max_source_length or own_source_length(model, tokenizer)
    args.max_target_length = args.max_target_length or own_length(config) - 1  # Without the start token.
    if args.length_penalty is None:
        args.length_penalty = 1.0 if config.length_penalty is None else config.length_penalty
    # So that all later searches rank as training does. A config keeps the length penalty only if it has beams.
    config.length_penalty, config.num_beams = args.length_penalty, args.num_cands
    check_generation(args.generator_name, model, tokenizer, args.num_cands)
    check_lengths(model, tokenizer, args.max_source_length, args.max_target_length)
    return model, tokenizer


def load_data(args, tokenizer, run):
    """(training RankedSamples, validation samples as a list of dicts); the facts of `run` get their digest."""
    train, val = (
        [read_sample(path) for path in sample_files(Path(args.dataset) / split)] for split in ("train", "val")
    )
    run.facts["data_digest"] = provenance.digest([train, val])
    train_set = RankedSamples(train, tokenizer, args.num_cands, args.max_source_length, args.max_target_length)
    if args.rank_weight and train_set.all_tied:
        raise UserError(
            f"{Path(args.dataset) / 'train'}: in every document, the first {args.num_cands} candidates have equal "
            "scores, so there is nothing to learn; generate more candidates, or set --rank_weight 0"
        )
    return train_set, val


if __name__ == "__main__":
    endings.run(main)
