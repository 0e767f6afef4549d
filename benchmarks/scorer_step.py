"""The speed-up of main.py's scorer training over the original's step. Targets: 1.5 on a CPU, 5 on CUDA.

    python3 benchmarks/scorer_step.py --data pubmed_abstracts.csv.gz
    python3 benchmarks/scorer_step.py --model_type minilm --updates 1    # a pretrained encoder, not random weights

The original processes one document at a time with three encoder calls, pads every text to the maximum length, and
tokenizes in its data workers in every epoch. `published` is the same, but pads as the published code does: to the
document's longest candidate. Both are reimplemented here; all arms make the same updates on the same documents. First,
the loss of an update is checked to be the same to 1e-5 in float32; then epochs are timed in turn, each including the
start of its loader. `half precision` is ours in bfloat16, where the hardware has instructions for it; its ratio is to
ours in single precision.

Documents and references are real. Candidates are spans of the document with distinct random scores: neither affects the
time, and without ties the original's loss equals ours.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, ON_CUDA, check, finish, get_parser, interleaved_rounds, new_record, ratio_summary, save

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import numpy as np
import torch
from data_utils import LengthBatches, TextEncoding, load_samples
from model import MARGIN, MAX_LEN, TOTAL_LEN, Scorer, load_encoder, load_scorer, ranking_loss
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertModel

from harness import arguments, endings
from harness.endings import UserError
from harness.loading import worker_loader
from harness.machine import multiplies_bfloat16
from scorer import short_attention
from texts.documents import find_dataset, read_documents
from texts.new_tokenizer import train_tokenizer

CANDIDATES = 16
BATCH, ACCUMULATE = 8, 2  # main.py's defaults: 16 documents an update.
UPDATE = BATCH * ACCUMULATE
TOLERANCE = 1e-5
TARGETS = {
    "cpu": {"original": ("at least", 1.5), "minilm, original": ("at least", 1.5)},
    "cuda": {"original": ("at least", 5.0), "minilm, original": ("at least", 5.0)},
}


def get_args_parser():
    parser = get_parser(__doc__, "scorer_step", rounds=7)
    parser.add_argument("--data", default="sample", help="CSV file of documents, or sample")
    parser.add_argument("--updates", type=arguments.positive_int, default=2, help="updates per timed epoch")
    parser.add_argument("--num_workers", type=arguments.non_negative_int, default=2, help="for each arm's loader")
    parser.add_argument("--model_type", help="encoder, as for main.py; its name becomes part of the "
                        "record's; by default one with random weights")  # fmt: skip
    parser.add_argument("--heads", type=arguments.positive_int, default=4, help="of the random encoder, 64 wide each")
    parser.add_argument("--layers", type=arguments.positive_int, default=4)
    return parser


def main():
    args = get_args_parser().parse_args()
    documents = read_documents(find_dataset(args.data))
    documents = [document for document in documents if len(document.text.split()) >= 60][: args.updates * UPDATE]
    if len(documents) < args.updates * UPDATE:
        raise UserError(
            f"{args.data} has {len(documents)} documents of at least 60 words; it needs --updates x {UPDATE}"
        )
    if args.model_type:
        _, encoding, _ = load_scorer(args.model_type, None, TOTAL_LEN, MAX_LEN)
    else:
        encoding = TextEncoding(train_tokenizer(documents, "bert", 2000), TOTAL_LEN, MAX_LEN)
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder) / "train", documents)
        arms = {
            "original": Original(args, folder, encoding, DEVICE, pad_to_longest=False),
            "published": Original(args, folder, encoding, DEVICE, pad_to_longest=True),
            "ours": Ours(args, folder, encoding, DEVICE),
        }
        difference = largest_difference(arms)
        if ON_CUDA or multiplies_bfloat16():
            arms["half precision"] = Ours(args, folder, encoding, DEVICE, torch.bfloat16)
            arms["half precision"].epoch()  # Warm-up; the other arms have had theirs.
        print(f"largest difference between the losses of an update: {difference:.1e}", flush=True)
        check(difference <= TOLERANCE, "the arms' losses differ")
        encoder = args.model_type and Path(args.model_type).name
        settings = {"model": encoder, "settings": vars(args), "largest_difference": difference}
        record, name = new_record("scorer_step", DEVICE, **settings), f"scorer_step_{encoder}" if encoder else None
        for seconds in interleaved_rounds({name: arm.epoch for name, arm in arms.items()}, args.rounds):
            ratios = {name: ratio_summary(seconds[name], seconds["ours"]) for name in ("original", "published")}
            if "half precision" in arms:
                ratios["half precision"] = ratio_summary(seconds["ours"], seconds["half precision"])
            load_share = arms["ours"].waited / sum(seconds["ours"])
            record |= {"seconds": seconds, "ratios": ratios, "load_share": load_share}
            save(record, args, name)
    print(f"ours: {100 * load_share:.2f} % of the epoch spent waiting for data, without the first batch")
    finish(record, args, name)


def write_samples(folder, documents):
    rng = random.Random(0)
    folder.mkdir()
    for number, document in enumerate(documents):
        words = document.text.split()
        length = len(document.summary.split())
        starts = rng.sample(range(len(words)), CANDIDATES)
        texts = [" ".join(words[start : start + max(3, length + rng.randint(-4, 4))]) for start in starts]
        candidates = [[[text], score] for text, score in zip(texts, rng.sample(range(1000), CANDIDATES), strict=True)]
        sample = {"article": [document.text], "abstract": [document.summary], "candidates": candidates}
        sample |= {f"{key}_untok": value for key, value in sample.items()}
        (folder / f"{number}.json").write_text(json.dumps(sample))


def make_encoder(args, encoding, device):
    """An encoder with the same weights at each call; without dropout, so that losses can be compared."""
    if args.model_type:
        encoder = load_encoder(args.model_type)[0]
    else:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(encoding.tokenizer),
            hidden_size=64 * args.heads,
            intermediate_size=256 * args.heads,
            num_attention_heads=args.heads,
            num_hidden_layers=args.layers,
            initializer_range=0.1,  # Large, so that scores differ and losses show more than margins.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        encoder = BertModel(config, add_pooling_layer=False)
    return encoder.to(device)


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)


class Ours:
    """The training loop of main.py without its reports. dtype: of autocast, or None."""

    steps_an_update = ACCUMULATE

    def __init__(self, args, folder, encoding, device, dtype=None):
        self.device = device
        self.scorer, self.dtype = Scorer(make_encoder(args, encoding, device)), dtype
        short_attention.prefer(self.scorer.encoder, device, dtype)
        self.optimizer = optimizer_of(self.scorer)
        dataset = load_samples(Path(folder) / "train", encoding, CANDIDATES, None, device.type, dtype)
        self.batches = LengthBatches(dataset.document_lengths, BATCH, ACCUMULATE, seed=0)
        self.loader = worker_loader(dataset, self.batches, args.num_workers, device, dataset.batch)
        self.order = self.batches.order()
        self.waited = 0.0  # Seconds spent waiting for data, except for each epoch's first batch.

    def losses(self):
        """Yield the loss of each step after its backward pass, times its share of the update."""
        batches = iter(self.loader)
        for number in range(len(self.batches)):
            start = time.perf_counter()
            batch = next(batches)
            self.waited += (time.perf_counter() - start) if number else 0
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                scores = self.scorer(batch)
            loss = ranking_loss(*scores, batch.rouge, batch.present, MARGIN) / ACCUMULATE
            loss.backward()
            yield loss.detach()

    def epoch(self):
        for number, _ in enumerate(self.losses(), 1):
            if number % self.steps_an_update == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()


class Original(Ours):
    """One document per step, as ordinary user code."""

    steps_an_update = UPDATE

    def __init__(self, args, folder, encoding, device, pad_to_longest):
        self.device, self.pad = device, encoding.pad
        self.encoder = make_encoder(args, encoding, device)
        self.optimizer = optimizer_of(self.encoder)
        self.dataset = TokenizingDataset(Path(folder) / "train", encoding, pad_to_longest)
        self.num_workers = args.num_workers

    def follow(self, order):
        """Take the documents in the order of another arm, so that the updates are on the same documents."""
        order = [int(number) for number in order]
        # Like ours, the workers persist across epochs.
        kept = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        self.loader = DataLoader(self.dataset, sampler=order, batch_size=1, **kept)

    def losses(self):
        for document, candidates, reference, scores in self.loader:
            ids = [each[0].to(self.device) for each in (document, candidates, reference)]
            document, candidates, reference = (self.encode(rows) for rows in ids)
            similarity = torch.cosine_similarity(candidates, document)
            gold = torch.cosine_similarity(reference, document)
            similarity = similarity[scores[0].argsort(descending=True).to(self.device)]
            loss = sum(
                torch.relu(similarity[step:] - similarity[:-step] + MARGIN * step).mean()
                for step in range(1, len(similarity))
            )
            loss = (loss + torch.relu(similarity - gold).mean()) / UPDATE
            loss.backward()
            yield loss.detach()

    def encode(self, ids):
        mask = (ids != self.pad).long()
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]


class TokenizingDataset(Dataset):
    """Reads, tokenizes and pads one sample at a time."""

    def __init__(self, folder, encoding, pad_to_longest):
        self.folder, self.encoding, self.pad_to_longest = folder, encoding, pad_to_longest

    def __getitem__(self, number):
        sample = json.loads((self.folder / f"{number}.json").read_text())
        texts = [" ".join(text) for text, _ in sample["candidates_untok"]]
        document = self.encoding.documents([" ".join(sample["article_untok"])])
        candidates = self.encoding.summaries(texts)
        reference = self.encoding.summaries([" ".join(sample["abstract_untok"])])
        scores = torch.tensor([float(score) for _, score in sample["candidates_untok"]])
        return self.rows(document, TOTAL_LEN), self.rows(candidates, MAX_LEN), self.rows(reference, MAX_LEN), scores

    def rows(self, texts, length):
        length = max(map(len, texts)) if self.pad_to_longest else length
        return torch.tensor([ids + [self.encoding.pad] * (length - len(ids)) for ids in texts])


def largest_difference(arms):
    """The largest difference between any arm's loss of the first update and ours; all start from the same weights."""
    found = {}
    for name, arm in arms.items():
        if name != "ours":
            arm.follow(arms["ours"].order)
        losses = arm.losses()
        found[name] = sum(float(next(losses)) for _ in range(arm.steps_an_update))
        losses.close()
        arm.optimizer.zero_grad()
    arms["ours"].waited = 0.0
    # max() would leave out a NaN that does not come first.
    return float(np.max([abs(value - found["ours"]) for value in found.values()]))


if __name__ == "__main__":
    endings.run(main)
