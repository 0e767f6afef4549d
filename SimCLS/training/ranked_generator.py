"""For brio.py: a generator fine-tuned on ranked candidates, with its samples, scores, validation and run files."""

import argparse
import contextlib
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from data_utils import ROUGE, padded

from harness import runs
from harness.devices import widest_float
from harness.files import output_lock, publish, staging
from harness.timing import nvtx_range
from pretrained.model_folders import GENERATOR_LOCK, files_of_model, refuse_to_replace
from scorer.metrics import mean_rouge
from search.generator import CandidateGenerator, generate_samples, search_settings
from texts.samples import as_document
from texts.sentences import SentenceSplitter

NO_TOKEN = -100  # Padding of labels in transformers.
NOT_RESULTS = (*runs.NOT_RESULTS, "max_steps", "save_dir", "num_workers")
VALIDATED_TOGETHER = 32  # Documents per batch.


class RankedSamples(torch.utils.data.Dataset):
    """Samples as from `texts.samples.read_sample`, in their order, as a generator's token ids.

    candidates: the most of a sample; the rest are left out. source_length, target_length: the most tokens of a document
    and of a summary. `dataset[epoch, number]` is just the number: `batch`, the DataLoader's collate function, makes the
    batch.
    """

    def __init__(self, samples, tokenizer, candidates, source_length, target_length):
        self.pad = tokenizer.pad_token_id
        self.sources, self.summaries, self.rouge = [], [], []
        for sample in samples:
            ranked = sample["candidates_untok"][:candidates]
            texts = [" ".join(sentences) for sentences in (sample["abstract_untok"], *(text for text, _ in ranked))]
            source = tokenizer(" ".join(sample["article_untok"]), truncation=True, max_length=source_length)
            targets = tokenizer(text_target=texts, truncation=True, max_length=target_length)
            self.sources.append(source["input_ids"])
            self.summaries.append(targets["input_ids"])
            self.rouge.append([score for _, score in ranked])

    def __getitem__(self, epoch_and_number):
        return epoch_and_number[1]

    @property
    def all_tied(self):
        """Whether no document has candidates with different scores."""
        return all(len(set(scores)) < 2 for scores in self.rouge)

    @property
    def document_lengths(self):
        """The number of tokens of each document, int64 [samples]."""
        return np.array([len(source) for source in self.sources])

    def batch(self, numbers):
        rouge = [self.rouge[number] for number in numbers]
        most = max(map(len, rouge))
        summaries = [self.summaries[number] + [[]] * (most - len(self.rouge[number])) for number in numbers]
        return RankedBatch(
            padded([self.sources[number] for number in numbers], self.pad, np.int64),
            torch.tensor([len(self.sources[number]) for number in numbers]),
            padded(list(itertools.chain(*summaries)), NO_TOKEN, np.int64),
            torch.tensor([each + [0.0] * (most - len(each)) for each in rouge]),
            torch.tensor([[place < len(each) for place in range(most)] for each in rouge]),
        )


class RankedBatch(NamedTuple):
    sources: torch.Tensor  # int64 [documents, tokens], padded at the end.
    lengths: torch.Tensor  # The documents' numbers of tokens, int64 [documents].
    summaries: torch.Tensor  # int64 [documents * (1 + candidates), tokens]: each document's reference, then candidates.
    rouge: torch.Tensor  # The candidates' scores, float32 [documents, candidates].
    present: torch.Tensor  # bool [documents, candidates], False for missing candidates.

    def to(self, device):
        return RankedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class RankedGenerator(torch.nn.Module):
    """model: a sequence-to-sequence model of transformers. A summary's score is its log-probability divided by its
    number of tokens ** length_penalty."""

    def __init__(self, model, tokenizer, length_penalty):
        super().__init__()
        self.model, self.tokenizer, self.length_penalty = model, tokenizer, length_penalty

    def forward(self, batch):
        """For a RankedBatch: (the candidates' scores, float32 [documents, candidates]; the references', float32
        [documents]; the references' cross-entropy per token, averaged over documents)."""
        documents, summaries = len(batch.sources), len(batch.summaries) // len(batch.sources)
        mask = (torch.arange(batch.sources.shape[1], device=batch.sources.device) < batch.lengths[:, None]).long()
        encoded = self.model.get_encoder()(input_ids=batch.sources, attention_mask=mask)
        states = encoded.last_hidden_state
        logits = self.model(
            # Each document is encoded only once.
            encoder_outputs=type(encoded)(last_hidden_state=states.repeat_interleave(summaries, 0)),
            attention_mask=mask.repeat_interleave(summaries, 0),
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(batch.summaries),
            use_cache=False,
        ).logits
        entropy = F.cross_entropy(logits.flatten(0, 1).float(), batch.summaries.flatten(), reduction="none")
        entropy = entropy.view(documents, summaries, -1).sum(2)
        tokens = (batch.summaries != NO_TOKEN).sum(1).clamp(min=1).view(documents, summaries)
        scores = -entropy / tokens**self.length_penalty
        return scores[:, 1:], scores[:, 0], (entropy[:, 0] / tokens[:, 0]).mean()

    def save(self, folder):
        """Write the generator in `from_pretrained` form; each file atomically."""
        with staging(folder) as stage:
            self.model.save_pretrained(stage)
            self.tokenizer.save_pretrained(stage)
            publish(stage, folder)


class Means(torch.nn.Module):
    """The loss, ranking loss and cross-entropy, averaged over the documents of an epoch; summed on the device."""

    names = ("loss", "ranking_loss", "cross_entropy")

    def __init__(self, device):
        super().__init__()
        self.register_buffer("totals", torch.zeros(1 + len(self.names), dtype=widest_float(device), device=device))

    @torch.no_grad()
    def add(self, weight, documents, *values):
        """Add a batch. values: its means, scalars in the order of `names`. weight: 0 leaves it out."""
        if weight:
            self.totals += documents * torch.stack([torch.ones_like(values[0]), *values]).to(self.totals.dtype)

    def take(self, world):
        """The means over all processes, name -> float. Resets the sums."""
        documents, *sums = world.sum(self.totals.clone()).tolist()
        self.totals.zero_()
        return {name: value / documents for name, value in zip(self.names, sums, strict=True)}


def validate(ranked, samples, args, world, stop):
    """The mean ROUGE of the generator's beam search: {"val_rouge1", "val_rouge2", "val_rougeL"}, 0 to 1.

    samples: as from `read_sample`; each process generates for its share. stop: a StopRequest; if true, returns None.
    """
    if stop:
        return None
    documents = [as_document(sample) for sample in samples]
    settings = {"num_cands": args.num_cands, "num_groups": 1, "diversity_penalty": 0.0}
    settings["decoder_max_len"] = args.max_target_length + 1  # With the start token.
    settings = search_settings(argparse.Namespace(**settings), ranked.model.generation_config)
    ranked.eval()
    generator = CandidateGenerator(ranked.model, ranked.tokenizer, settings, args.max_source_length)
    with nvtx_range("validation"):
        # Punkt learns from all documents, so that the sentences do not depend on the number of processes.
        split, share = SentenceSplitter(each.text for each in documents).split, documents[world.rank :: world.size]
        written = generate_samples(generator, share, VALIDATED_TOGETHER, args.rouge_tokens, split)
    ranked.train()
    figures = np.sum([each["rouge"][0] for each in written], axis=0) if written else np.zeros(len(ROUGE))
    sums = world.sum(torch.tensor(figures, dtype=widest_float(world.device), device=world.device)).tolist()
    return {f"val_{name}": value / len(documents) for name, value in zip(ROUGE, sums, strict=True)}


class BrioRun(runs.Run):
    """A Run in --save_dir, where the generator of the best epoch is kept. Its state has the parts "ranked",
    "optimizer", "scaler" and "means"."""

    title = "training brio"
    unit = "documents"
    elsewhere = "--save_dir"

    def __init__(self, args, world, **facts):
        why = "the learning rate falls to 0 at the last epoch"
        # A profile keeps no generator, and its record does not replace the one of the generator that is there.
        name = f"brio_{args.max_steps}_steps" if args.max_steps else "brio"
        super().__init__("brio", args.save_dir, name, args, world, NOT_RESULTS, why, **facts)
        self.results = () if args.max_steps else files_of_model(self.folder)

    @contextlib.contextmanager
    def lock(self):
        with contextlib.ExitStack() as held:
            if self.world.is_main and not self.is_dry:  # Neither script replaces the generator that the other trains.
                held.enter_context(output_lock(self.folder / GENERATOR_LOCK))
            held.enter_context(super().lock())
            yield

    def _claim_name(self):
        super()._claim_name()
        fresh = not any(getattr(self.args, name) for name in ("resume", "restart"))
        ours = self.path(".json").exists() or self.path(".state").exists()
        if fresh and not ours and not self.args.max_steps:
            refuse_to_replace(self.folder, ", or --restart to replace it")

    def begin(self, epoch, result):
        """Record `result`, the validation of the original generator, before the first step."""
        if result is None:
            self.leave(epoch)
        self.facts["before"] = result
        rouge = ", ".join(f"{name} {100 * result[f'val_{name}']:.2f}" for name in ROUGE)
        self.world.say(f"before the first epoch: {rouge}")

    def add_epoch(self, epoch, result, evaluation_seconds):
        """Append an Epoch to the history, and save its generator if it is the best; UserError, with nothing written, if
        its loss or a weight is not finite."""
        means = self.state["means"].take(self.world)
        self.check_finite(epoch, means["loss"], "Use a smaller --lr")
        before = [mean_rouge(each) for each in self.history]
        self.record_epoch(epoch, evaluation_seconds, **means, **result)
        is_best = mean_rouge(result) > max(before, default=-1)
        if is_best and self.world.is_main and not self.args.max_steps:
            self.state["ranked"].save(self.folder)

    def line(self):
        """The latest epoch in one line of text."""
        epoch = self.history[-1]
        rouge = ", ".join(f"{name} {100 * epoch[f'val_{name}']:.2f}" for name in ROUGE)
        return (
            f"epoch {epoch['epoch']}/{self.args.num_epoch}: ranking loss {epoch['ranking_loss']:.4f}, cross-entropy "
            f"{epoch['cross_entropy']:.3f}, {rouge}, {epoch['timing']['seconds']:.1f} s"
        )

    def finish(self):
        """Write the record, then delete the state; nothing if --max_steps ended the run."""
        if not self.stop.enough:
            self.write_record()
            self.drop_state()
            best = max(map(mean_rouge, self.history))
            # Missing if the run began with --max_steps.
            before = mean_rouge(self.facts["before"]) if "before" in self.facts else None
            told = "" if before is None else f", {100 * before:.2f} before"
            self.world.say(f"{self.folder}: best validation ROUGE {100 * best:.2f} (mean of the three){told}")
            if before is not None and best <= before:
                self.world.say(f"warning: no epoch is better than {self.args.generator_name}; try a lower --lr")
