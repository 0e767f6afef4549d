"""Stage 1 of 5: fine-tune a generator (any sequence-to-sequence model) on the documents and summaries of a CSV file.

    python3 finetune_model.py --generator_name t5-small --dataset_name clean_covid.csv --save_dir models/t5_covid

After each epoch the model summarises the validation documents. At the end, --save_dir contains the model of the epoch
with the best mean of ROUGE-1, -2 and -Lsum in `from_pretrained` form, and `finetune.json`, the record of the run.
An interrupted run continues with --resume, and ends with the same weights as without the interruption. A finished run,
or any other model in --save_dir, is replaced only with --restart.

The training loop is deliberately the Trainer of transformers, to show that what the other scripts measure in their own
loops also holds for the library's. A callback marks the phases of its steps, so that nsys shows them as in the others.

A model from scratch is slow to learn what summaries need most: copying from the document. --lead_words teaches it that
before the summaries (Zhu et al., 2021, Leveraging Lead Bias for Zero-shot Abstractive News Summarization).
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

import torch
import transformers

from harness import arguments, determinism, devices, endings, resume, runs, torchvision_compat, tracing  # noqa: F401
from harness.distributed import World
from harness.endings import UserError
from harness.files import as_recorded, output_lock, places, publish, staging, write_json, write_record
from harness.job import read_job
from harness.machine import describe_machine
from harness.precision import add_half_precision, choose_precision
from harness.resume import changes, check_arguments, stop_requests
from pretrained.model_folders import (
    GENERATOR_LOCK,
    check_apart,
    check_lengths,
    files_of_model,
    half_precision_dtype,
    refuse_to_replace,
)
from search.generator import check_generation, check_least, load_generator
from search.token_rules import unsupported_settings
from texts import provenance
from texts.documents import add_dataset_arguments, read_splits
from texts.rouge_scores import add_rouge_argument, check_references
from texts.sentences import SentenceSplitter
from training.generator_trainer import NvtxPhases, PlainProgress, Rouge, StopAndSave, SummaryDataset, Trainer

NOT_RESULTS = (*runs.NOT_RESULTS, "save_dir")
STATE_FILES = ("model*", "optimizer.pt", "scheduler.pt", "rng_state*")  # The Trainer's, besides trainer_state.json.


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    integer = arguments.positive_int
    parser.add_argument(
        "--generator_name", "--pt_model", required=True, help="model to start from: folder, or name on the hub"
    )
    add_dataset_arguments(parser, percent="of each split")
    parser.add_argument("--save_dir", type=Path, required=True, help="folder for the fine-tuned generator")
    parser.add_argument("--lead_words", type=integer, help="number of first words of each document to train on instead "
                        "of its summary")  # fmt: skip
    resume.add_arguments(parser)
    parser.add_argument("--seed", type=arguments.numpy_seed, default=0, help="seed of the sample order and dropout")

    training = parser.add_argument_group("training")
    training.add_argument("--num_epoch", type=integer, default=5, help="passes over the training documents")
    training.add_argument("--max_steps", type=integer, help="stop after this many updates; overrides --num_epoch")
    tracing.add_argument(training)
    training.add_argument("--batch_size", type=integer, default=16, help="documents per step, over all processes")
    training.add_argument("--lr", type=arguments.learning_rate, default=3e-4, help="peak learning rate of AdamW")
    training.add_argument("--warmup", type=arguments.positive_share, default=0.05,
        help="share of the updates in which the learning rate rises to its peak; then it falls to 0")  # fmt: skip
    training.add_argument("--label_smoothing", type=arguments.share_below_one, default=0.1,
                          help="weight of the uniform distribution in the target")  # fmt: skip
    training.add_argument("--dropout", type=arguments.share_below_one, help="default: the generator's own")
    add_half_precision(training, "autocast, in float16 when no type is named; on a CPU, and for the T5 family, in "
                       "bfloat16", unnamed="auto")  # fmt: skip
    training.add_argument("--use_checkpoint", "--gradient_checkpointing", **arguments.FLAG,
                          help="recompute activations in the backward pass")  # fmt: skip
    devices.add_arguments(parser)
    determinism.add_argument(training)

    lengths = parser.add_argument_group("lengths, in tokens; longer texts are cut")
    lengths.add_argument("--max_source_length", type=integer, default=512, help="maximum of a document")
    lengths.add_argument("--max_target_length", type=integer, default=64, help="maximum of a summary")

    evaluation = parser.add_argument_group("validation")
    evaluation.add_argument("--num_beams", type=integer, default=1, help="beams of the validation's search")
    evaluation.add_argument("--eval_limit", type=integer, default=500, help="validation documents to use")
    add_rouge_argument(evaluation)
    return parser


def main():
    args = get_args_parser().parse_args()
    check_apart(args.save_dir, args.generator_name)
    job = read_job()
    if not job.is_started:
        show_only_one_gpu(args)
    determinism.apply(args)
    device = devices.choose(args)
    args.device = device.type  # For the Trainer and the record.
    world = World(job.rank, job.size, device)
    world.check_divisible(args.batch_size)
    say = world.say
    precision = choose_precision(args.half_precision, device, say=say)
    _, documents, splits = read_splits(args)
    args.documents_digest = provenance.digest(documents)  # An argument: a run resumes only with these.
    if args.lead_words:
        splits = {split: [with_lead(each, args.lead_words) for each in part] for split, part in splits.items()}
    summaries = (document.summary for part in splits.values() for document in part)
    check_references(summaries, args.rouge_tokens, args.dataset_name, say)
    model, tokenizer = load_generator(args.generator_name, dropout=args.dropout)
    check_lengths(model, tokenizer, args.max_source_length, args.max_target_length)
    set_lengths(args, model, tokenizer)
    check_generation(args.generator_name, model, tokenizer, args.num_beams)
    for setting in unsupported_settings(model.generation_config):
        say(f"warning: the generation config sets {setting}, with which gen_candidate.py will refuse this generator")
    transformers.set_seed(args.seed)
    dtype = half_precision_dtype(model.config, args.half_precision, precision)
    with output_lock(args.save_dir / GENERATOR_LOCK) if world.is_main else contextlib.nullcontext():
        finetune(args, model, tokenizer, splits, dtype)


def show_only_one_gpu(args):
    """Hide all GPUs from this process except that of --device, which becomes the first. The Trainer would use all GPUs
    that it sees, which would change the meaning of --batch_size and --warmup.

    Must be called before anything else uses CUDA, which reads the variable once. A GPU that does not exist stays in
    --device, to be reported later.
    """
    kind, _, number = (args.device or "cuda").partition(":")
    number = int(number or 0)
    if kind != "cuda" or number >= torch.cuda.device_count():  # device_count asks only the driver.
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # `number` is an index into it.
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number] if visible else str(number)
    args.device = "cuda"


def set_lengths(args, model, tokenizer):
    """Store the lengths with the model, so that the other stages cut documents and end summaries as training does. The
    start token counts towards `max_length`. UserError if the generator's min_length is larger."""
    check_least(model.generation_config.min_length or 0, args.max_target_length, "--max_target_length")
    tokenizer.model_max_length = args.max_source_length
    model.generation_config.max_length, model.generation_config.max_new_tokens = args.max_target_length, None
    model.generation_config._from_model_config = False


def with_lead(document, words):
    """The Document whose summary is the first `words` words of its text."""
    return document._replace(summary=" ".join(document.text.split()[:words]))


def saved_states(folder):
    """The Paths of the states that the Trainer saved in `folder`, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def is_whole(state):
    """Whether the Path `state` is complete: a run may be killed while writing or removing a state. The Trainer writes
    trainer_state.json last."""
    with contextlib.suppress(OSError, ValueError):
        json.loads((state / "trainer_state.json").read_bytes())
        return all(any(state.glob(pattern)) for pattern in STATE_FILES)
    return False


def state_to_resume(args, checkpoints):
    """The state to resume from, or None; UserError if another run's state would be lost or resumed."""
    begun, is_main = checkpoints / "arguments.json", read_job().rank == 0
    last = None if args.restart else next((str(path) for path in saved_states(checkpoints) if is_whole(path)), None)
    if args.restart and is_main:
        shutil.rmtree(checkpoints, ignore_errors=True)
    elif last and not args.resume:
        raise UserError(f"{args.save_dir} holds an interrupted run; --resume continues it, --restart starts over")
    elif not args.restart and any(checkpoints.glob("[!.]*")) and not begun.is_file():  # It is deleted in the end.
        raise UserError(
            f"{checkpoints} contains files that this script did not write; choose another --save_dir, or --restart "
            "to replace them"
        )
    elif args.resume and begun.is_file():  # There may be no state yet, if it was killed in its first epoch.
        check_arguments(last or begun, json.loads(begun.read_bytes()), settings_of(args))
    elif not (args.restart or last):
        refuse_a_finished_run(args)
    for state in saved_states(checkpoints) if is_main else ():
        if not is_whole(state):
            shutil.rmtree(state, ignore_errors=True)
    if last is None:
        if args.resume and is_main:
            print(f"no saved state in {checkpoints}; starting from the beginning", flush=True)
        if is_main:
            write_json(begun, settings_of(args))
    return last


def refuse_a_finished_run(args):
    """UserError if --save_dir contains another model, a finished run with other arguments or, without --resume, this
    finished run."""
    path, ours = args.save_dir / "finetune.json", as_recorded(settings_of(args))
    finished = finished_arguments(path)
    if finished is None:
        refuse_to_replace(args.save_dir, ", or --restart to replace it")
        return
    was = changes({name: finished.get(name) for name in ours}, ours)
    if was:
        raise UserError(f"{path} is from a run with {was}; choose another --save_dir, or --restart to replace it")
    if not args.resume:
        raise UserError(f"{path} is a finished run; --restart runs it again")


def finished_arguments(path):
    """The arguments in the record at `path`, a dict as from `as_recorded`; None if there is no valid record."""
    try:
        record = json.loads(path.read_bytes())
        return as_recorded(record["arguments"], record.get("places"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_of(args):
    """The arguments that a resumed run must share, a dict of plain values."""
    return {name: value for name, value in vars(args).items() if name not in NOT_RESULTS}


def finetune(args, model, tokenizer, splits, dtype):
    """Train, and write the best model, its tokenizer and the record of the run to args.save_dir."""
    checkpoints, finished = args.save_dir / "checkpoints", args.save_dir / ".finished"
    shutil.rmtree(finished, ignore_errors=True)  # Left by a run that was killed while removing it.
    done = args.save_dir / "finetune.json"
    if args.resume and not checkpoints.is_dir() and done.is_file():
        refuse_a_finished_run(args)
        for path in files_of_model(args.save_dir):
            if not path.is_file():
                raise UserError(f"{done} is finished, but {path} is gone; put it back, or --restart to train again")
        if read_job().rank == 0:
            print(f"{done} is finished; nothing to resume")
        return
    last = state_to_resume(args, checkpoints)
    trainer = make_trainer(args, model, tokenizer, splits, dtype, checkpoints)
    generation_config = copy.deepcopy(model.generation_config)  # Validation fills in defaults, and wants one summary.
    model.generation_config.num_return_sequences = None
    started = time.perf_counter()
    # With several processes no StopRequest: they would stop at different steps, and wait for each other.
    traced = tracing.trace(args.trace if trainer.is_world_process_zero() else None, trainer.args.device, print)
    with stop_requests(enabled=trainer.args.world_size == 1) as stop, traced:
        trainer.add_callback(StopAndSave(stop))
        trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - started
    check_finite(trainer.state, checkpoints)
    trainer.accelerator.wait_for_everyone()  # All processes must have read the best state before it is removed.
    if trainer.is_world_process_zero():
        trainer.model.generation_config = generation_config
        with staging(args.save_dir) as stage:
            trainer.save_model(stage)
            write_record(stage / "finetune.json", record(args, trainer, seconds))
            publish(stage, args.save_dir)
        # Renamed first, which is atomic: a run must not resume from a partly deleted state.
        checkpoints.rename(finished)
        shutil.rmtree(finished)
        print(f"best epoch's mean ROUGE on validation: {trainer.state.best_metric:.4f}; saved in {args.save_dir}")


def check_finite(state, checkpoints):
    """UserError if training has diverged. state: the TrainerState; the saved state in `checkpoints` is kept."""
    loss = next(entry["eval_loss"] for entry in reversed(state.log_history) if "eval_loss" in entry)
    if not (math.isfinite(loss) and math.isfinite(state.best_metric)):
        raise UserError(
            f"training has diverged: the validation loss is {loss}, the best ROUGE {state.best_metric}; the last state "
            f"is kept in {checkpoints}; run the script again with a smaller --lr and another --save_dir"
        )


def make_trainer(args, model, tokenizer, splits, dtype, checkpoints):
    lengths = args.max_source_length, args.max_target_length
    train_set, validated = SummaryDataset(splits["train"], tokenizer, *lengths), splits["val"][: args.eval_limit]
    split = SentenceSplitter(document.text for document in splits["val"]).split
    trainer = Trainer(
        model,
        training_arguments(args, checkpoints, len(train_set), dtype),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model, pad_to_multiple_of=8 if dtype else None),
        train_dataset=train_set,
        eval_dataset=SummaryDataset(validated, tokenizer, *lengths),
        processing_class=tokenizer,
        compute_metrics=Rouge(tokenizer, [document.summary for document in validated], split, args.rouge_tokens),
    )
    trainer.add_callback(NvtxPhases)
    if not sys.stderr.isatty():
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.remove_callback(transformers.ProgressCallback)
        trainer.add_callback(PlainProgress)
    return trainer


def training_arguments(args, checkpoints, num_samples, dtype):
    """The Trainer's settings: every epoch ends with a validation and a saved state; the best and the last are kept."""
    # Where the newer name exists, the older one warns.
    fields = transformers.Seq2SeqTrainingArguments.__dataclass_fields__
    recomputation = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    updates = args.max_steps or -(-num_samples // args.batch_size) * args.num_epoch
    settings = dict(
        output_dir=str(checkpoints),
        num_train_epochs=args.num_epoch,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.batch_size // read_job().size,
        per_device_eval_batch_size=4 * args.batch_size,
        learning_rate=args.lr,
        warmup_steps=round(args.warmup * updates),
        label_smoothing_factor=args.label_smoothing,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        **{recomputation: args.use_checkpoint},
        predict_with_generate=True,
        generation_max_length=args.max_target_length,
        generation_num_beams=args.num_beams,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="rouge",
        logging_steps=50,
        report_to="none",
        use_cpu=args.device == "cpu",
        disable_tqdm=not sys.stderr.isatty(),
        seed=args.seed,
    )
    with endings.signals_end_at_once():  # The library waits here for the other processes of a job.
        return transformers.Seq2SeqTrainingArguments(**settings)


def record(args, trainer, seconds):
    """The record of the run (arguments, machine, and each epoch's loss and ROUGE), a dict of plain JSON values."""
    return {
        "arguments": vars(args),
        "places": places(vars(args)),
        "machine": describe_machine(trainer.args.device),
        "parameters": trainer.model.num_parameters(),
        "train_seconds": seconds,
        "best_rouge": trainer.state.best_metric,
        "history": [plain_figures(each) for each in trainer.state.log_history],
    }


def plain_figures(figures):
    """`figures` with None for NaN and infinity, such as the gradient norm of a step that loss scaling skipped."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }


if __name__ == "__main__":
    endings.run(main)
