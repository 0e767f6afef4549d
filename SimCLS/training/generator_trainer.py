"""For finetune_model.py: the Trainer of transformers with our data, ROUGE, sample order and callbacks."""

import time

import numpy as np
import torch
import transformers
from transformers.trainer_pt_utils import LengthGroupedSampler

from harness.timing import nvtx_range
from texts.documents import clean
from texts.rouge_scores import METRICS, score
from texts.samples import split_lower
from texts.sentences import ptb_tokenize


class SummaryDataset(torch.utils.data.Dataset):
    """Tokenized documents: {"input_ids", "attention_mask", "labels"}, lists of ints that end with the end token."""

    def __init__(self, documents, tokenizer, max_source_length, max_target_length):
        sources = [document.text for document in documents]
        targets = [document.summary for document in documents]
        inputs = tokenizer(sources, truncation=True, max_length=max_source_length)
        labels = tokenizer(text_target=targets, truncation=True, max_length=max_target_length)
        self.samples = [
            {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": label_ids}
            for input_ids, label_ids in zip(inputs["input_ids"], labels["input_ids"], strict=True)
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Rouge:
    """Turns the Trainer's predictions into mean F-measures of ROUGE-1, -2, -Lsum (0 to 1) and their mean, `rouge`.

    Texts are tokenized and split into sentences as in preprocess.py, so the values compare with evaluate_model.py's.

    tokenizer: the generator's. references: the reference summaries of the predicted documents, in their order.
    split: text -> list of sentences. tokens: what ROUGE counts, a key of ROUGE_TOKENS.
    """

    def __init__(self, tokenizer, references, split, tokens="standard"):
        self.tokenizer, self.split, self.tokens = tokenizer, split, tokens
        self.references = [self._sentences(reference) for reference in references]

    def __call__(self, prediction):
        """prediction.predictions: int array [documents, tokens], padded with -100."""
        token_ids = [[token for token in row if token >= 0] for row in prediction.predictions.tolist()]
        summaries = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        # With several processes, the first documents are repeated at the end, so that all processes have equally many.
        summaries = summaries[: len(self.references)]
        figures = [
            score(reference, [self._sentences(clean(summary))], self.tokens)
            for reference, summary in zip(self.references, summaries, strict=True)
        ]
        means = dict(zip(METRICS, np.concatenate(figures).mean(0).tolist(), strict=True))
        return {**means, "rouge": sum(means.values()) / len(means)}

    def _sentences(self, text):
        return split_lower(ptb_tokenize(text), self.split)


class EpochSampler(LengthGroupedSampler):
    """Groups samples of similar length, in an order that depends only on `seed` and the epoch.

    The Trainer's own sampler draws from the global generator when the epoch begins, so a run that resumes within an
    epoch would get another order.
    """

    def __init__(self, batch_size, lengths, seed):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed

    def set_epoch(self, epoch):
        entropy = np.random.SeedSequence((self.seed, epoch))  # Of another seed, no epoch has the same order.
        self.generator = torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


class Trainer(transformers.Seq2SeqTrainer):
    """The library's Trainer, with another sample order and another choice of the best epoch."""

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(sample["input_ids"]) for sample in self.train_dataset.samples]
        return EpochSampler(self.args.train_batch_size, lengths, self.args.seed)

    def _determine_best_metric(self, metrics, trial):
        """Of epochs with equal ROUGE, the one with the lower loss is better. The first epochs of a model from scratch
        all have the same."""
        losses = {each["step"]: each["eval_loss"] for each in self.state.log_history if "eval_loss" in each}
        tie = metrics["eval_rouge"] == self.state.best_metric
        if tie and metrics["eval_loss"] < losses[self.state.best_global_step]:
            self.state.best_metric = None
        return super()._determine_best_metric(metrics, trial)

    def evaluate(self, *args, **kwargs):
        with nvtx_range("validation"):
            return super().evaluate(*args, **kwargs)


class NvtxPhases(transformers.TrainerCallback):
    """NVTX ranges: "training generator" > "epoch 1" > "epoch 1 - step 1" > the phases of the step.

    "forward" ends with the model's own forward: with label smoothing, the loss is computed in "backward".
    """

    def __init__(self):
        self._ranges = []  # The open ones, outermost first.

    def _open(self, level, name):
        """Open a range inside the `level` outermost ones, after closing all that are deeper."""
        self._close(level)
        self._ranges.append(nvtx_range(name))
        self._ranges[-1].__enter__()

    def _close(self, level):
        while len(self._ranges) > level:
            self._ranges.pop().__exit__(None, None, None)

    def _open_step(self, state, loader):
        epoch, step = divmod(state.global_step, len(loader))
        self._open(2, f"epoch {epoch + 1} - step {step + 1}")
        self._open(3, "data load")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._open(0, "training generator")
        model.register_forward_pre_hook(lambda model, inputs: self._open_phase(model, "forward"))
        model.register_forward_hook(lambda model, inputs, output: self._open_phase(model, "backward"))

    def _open_phase(self, model, name):
        if model.training:  # Not during validation.
            self._open(3, name)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self._open(1, f"epoch {state.global_step // len(train_dataloader) + 1}")
        self._open_step(state, train_dataloader)

    def on_step_begin(self, args, state, control, **kwargs):
        self._close(3)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._open(3, "optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._open(3, "zero grad")

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        if state.global_step % len(train_dataloader) == 0 or control.should_training_stop:
            self._close(2)  # No step follows in this epoch.
        else:
            self._open_step(state, train_dataloader)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._close(1)

    def on_train_end(self, args, state, control, **kwargs):
        self._close(0)


class PlainProgress(transformers.TrainerCallback):
    """One line per logging step or validation, for log files, where a progress bar would be noise."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        figures = ", ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
        now = time.strftime("%H:%M:%S")
        print(f"{now} step {state.global_step}/{state.max_steps}, epoch {state.epoch:.2f}: {figures}", flush=True)


class StopAndSave(transformers.TrainerCallback):
    """Ends training once `stop`, a StopRequest, is true, after saving the state after the current step.

    In an epoch's last step, and in the validation after it, training ends at once; a resumed run uses an older state.
    """

    def __init__(self, stop):
        self.stop = stop

    def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
        if self.stop:
            if state.global_step % len(train_dataloader) == 0:
                self.stop.leave()
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.stop:
            self.stop.leave()

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.stop:
            self.stop.leave()
