"""Tokenized samples and batches of them, for main.py and evaluate_model.py.

Each split is tokenized once per tokenizer and lengths. The token ids are cached next to the split's folder, in a
safetensors file that is memory-mapped.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from tqdm import tqdm

from harness.endings import UserError
from harness.files import atomic_write
from harness.loading import EpochBatches, worker_loader
from harness.machine import multiplies_bfloat16
from pretrained.model_folders import tokenizer_settings, tokenizer_text
from texts.rouge_scores import agreement, check_references, score
from texts.samples import read_sample, sample_files

FORMAT = 4
ROUGE = ("rouge1", "rouge2", "rougeL")  # The published names; there, too, rougeL means rougeLsum.
CHUNK = 256  # Samples that are tokenized together.
POOL = 32  # Batches whose samples are sorted by length together.

# One more encoder call costs about as much as this many more tokens in an existing call. On a CPU with instructions for
# bfloat16 the tokens cost less in it: in groups by 200 to 400 instead of 64, a step of a small encoder takes 0.7 to 0.9
# times as long there, and in float32 1.1 to 1.2 times (a Xeon with AMX, 4 documents with 8 candidates).
TOKENS_PER_CALL = {"cpu": 64, "cpu in bfloat16": 256, "cuda": 2048}


class TextEncoding:
    """Turns texts into token ids, [first] text [end], with the tokenizer's own special tokens.

    If the tokenizer puts no special token first, its CLS, BOS or EOS token (for T5, EOS) is prepended, so that the
    first token's state represents the text and not a word.

    total_len, max_len: the most tokens of a document and of a summary, including special tokens; longer ones are cut.
    """

    def __init__(self, tokenizer, total_len, max_len):
        self.tokenizer, self.total_len, self.max_len = tokenizer, total_len, max_len
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._first = [] if _begins_with_special_token(tokenizer) else [_token_to_begin_with(tokenizer)]
        self.fingerprint = _digest(tokenizer_text(tokenizer))
        more = tokenizer_settings(tokenizer)
        self.settings_digest = None if more is None else _digest(more)

    def documents(self, texts):
        """The token ids of a list of str: a list of lists of int."""
        return self._encode(texts, self.total_len)

    def summaries(self, texts):
        return self._encode(texts, self.max_len)

    def _encode(self, texts, length):
        encoded = self.tokenizer(
            texts, truncation=True, max_length=length - len(self._first), return_attention_mask=False
        )
        return [self._first + ids for ids in encoded["input_ids"]]


def _begins_with_special_token(tokenizer):
    """Whether the tokenizer puts a token before every text. Having a CLS token does not show where it goes."""
    empty, *others = tokenizer(["", "a", "the 7"])["input_ids"]
    return bool(empty) and all(ids[0] == empty[0] and len(ids) > len(empty) for ids in others)


def _token_to_begin_with(tokenizer):
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError(f"the tokenizer {tokenizer.name_or_path} has no CLS, BOS or EOS token to begin a text with")


def _digest(text):
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# -------------------------------------------------------------------------------------------------- token ids


class SampleSet(torch.utils.data.Dataset):
    """The tokenized samples of one split, in the order of their numbers.

    arrays: as from `tokenize_samples`. Equal texts of a sample are stored and encoded once. device_type, dtype: of the
    device that uses the batches, and of autocast there, if any. `dataset[epoch, number]` is just the number: `batch`,
    the DataLoader's collate function, makes the batch.
    """

    def __init__(self, arrays, encoding, device_type, dtype=None):
        self._arrays = arrays
        self._pad = encoding.pad
        if device_type == "cpu" and dtype is torch.bfloat16 and multiplies_bfloat16():
            device_type = "cpu in bfloat16"
        self._tokens_per_call = TOKENS_PER_CALL.get(device_type, TOKENS_PER_CALL["cuda"])

    def __len__(self):
        return len(self._arrays["sample_start"]) - 1

    def __getitem__(self, epoch_and_number):
        return epoch_and_number[1]

    @property
    def document_lengths(self):
        """The number of tokens of each sample's document, int64 [samples]."""
        first = self._arrays["sample_start"][:-1]
        return self._arrays["text_start"][first + 1] - self._arrays["text_start"][first]

    @property
    def most_candidates(self):
        """The largest number of candidates of any sample."""
        return int(np.diff(self._arrays["candidate_start"]).max())

    @property
    def all_tied(self):
        """Whether no sample has candidates with different scores."""
        counts = np.diff(self._arrays["candidate_start"])
        firsts = self._arrays["score"][self._arrays["candidate_start"][:-1]]
        return bool((self._arrays["score"] == np.repeat(firsts, counts)).all())

    @property
    def digest(self):
        """A digest of what a scorer learns from and is judged by. The agreement is left out: it follows from the texts,
        and its last bits from the machine."""
        every = hashlib.blake2b(digest_size=8)
        for name, array in sorted(self._arrays.items()):
            if name != "agreement":
                every.update(f"{name} {array.dtype} {array.shape}".encode())
                every.update(np.ascontiguousarray(array))
        return every.hexdigest()

    def figures(self, name, number):
        """The values `name` of the candidates of sample `number`, an array [candidates, ...]; None if the split has
        none.

        name: "score", from the sample file; "rouge", the F-measures of ROUGE-1, -2 and -Lsum, or "agreement", as from
        `texts.rouge_scores.agreement` (a training split has neither); "likelihood", log-probability and number of
        tokens.
        """
        if name not in self._arrays:
            return None
        start, end = self._arrays["candidate_start"][number : number + 2]
        return self._arrays[name][start:end]

    def batch(self, numbers):
        """The Batch of the samples `numbers`, in their order."""
        texts, documents, candidates = [], [], []
        for number in numbers:
            documents.append(len(texts))
            candidates.append(self.figures("candidate_text", number) + len(texts))
            start, end = self._arrays["sample_start"][number : number + 2]
            bounds = self._arrays["text_start"][start : end + 1]
            texts += [self._arrays["ids"][begin:stop] for begin, stop in itertools.pairwise(bounds)]
        groups, lengths, row_of_text = _pad_groups(texts, self._pad, self._tokens_per_call)
        documents = np.array(documents)
        return Batch(
            groups,
            lengths,
            torch.from_numpy(row_of_text[documents]),
            torch.from_numpy(row_of_text[documents + 1]),
            padded([row_of_text[each] for each in candidates], 0, np.int64),
            padded([self.figures("score", number) for number in numbers], 0, np.float32),
            padded([np.ones(len(each)) for each in candidates], 0, bool),
        )


class Batch(NamedTuple):
    """The scorer's input. `documents`, `references` and `candidates` are row numbers in the concatenation of all groups
    of `texts`."""

    texts: list  # Groups of similar length, longest first: int64 [rows, tokens], padded at the end.
    lengths: list  # Per group int64 [rows], or None if it has no padding.
    documents: torch.Tensor  # int64 [samples]
    references: torch.Tensor  # int64 [samples]
    candidates: torch.Tensor  # int64 [samples, candidates]
    rouge: torch.Tensor  # The candidates' scores, float32 [samples, candidates].
    present: torch.Tensor  # bool [samples, candidates], False for missing candidates.

    def to(self, device):
        """The batch on `device`; copies from pinned memory are asynchronous."""

        def copied(value):
            if isinstance(value, list):
                return [each if each is None else each.to(device, non_blocking=True) for each in value]
            return value.to(device, non_blocking=True)

        return Batch(*map(copied, self))


def _pad_groups(texts, pad, tokens_per_call):
    """Group texts by length, so that a group's padding costs less than one more encoder call.

    texts: list of int arrays. Returns (groups, lengths) as in Batch, and the row of each text, int64 [texts].
    """
    sizes = np.array([len(text) for text in texts])
    order = np.argsort(-sizes, kind="stable")
    starts, wasted = [0], 0
    for position, size in enumerate(sizes[order]):
        wasted += sizes[order[starts[-1]]] - size
        if wasted > tokens_per_call:
            starts.append(position)
            wasted = 0
    groups, lengths = [], []
    for start, end in itertools.pairwise([*starts, len(order)]):
        members = order[start:end]
        groups.append(padded([texts[member] for member in members], pad, np.int64))
        even = sizes[members[0]] == sizes[members[-1]]
        lengths.append(None if even else torch.from_numpy(sizes[members]))
    row_of_text = np.empty(len(texts), dtype=np.int64)
    row_of_text[order] = np.arange(len(texts))
    return groups, lengths, row_of_text


def padded(rows, value, dtype):
    """1D lists or arrays as one tensor [rows, longest] of this NumPy dtype, padded at the end with `value`."""
    array = np.full((len(rows), max(map(len, rows))), value, dtype)
    for place, row in zip(array, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(array)


class TokenizedSample(NamedTuple):
    texts: list  # int32 arrays: the document, the reference, then the distinct candidates.
    candidates: list  # The index of each candidate in `texts`.
    scores: list
    rouge: np.ndarray | None  # float32 [candidates, 3]
    agreement: np.ndarray | None  # float32 [candidates]
    likelihood: np.ndarray | None  # float32 [candidates, 2]


def tokenize_samples(samples, encoding, max_num, rouge_tokens=None):
    """The arrays of a SampleSet.

    samples: iterable of dicts as from `read_sample`. max_num: the most candidates of a sample; the rest are left out.
    rouge_tokens: if given, also compute each candidate's three ROUGE scores and its agreement with the others, which
    choosing among them needs, with this tokenization of ROUGE.
    """
    samples, references = iter(samples), []
    chunks = iter(lambda: list(itertools.islice(samples, CHUNK)), [])
    tokenized = []
    for chunk in chunks:
        tokenized += _tokenize_chunk(chunk, encoding, max_num, rouge_tokens)
        if rouge_tokens:
            references += [" ".join(sample["abstract"]) for sample in chunk]
    if rouge_tokens:  # For all samples together: a chunk may happen to be mostly in another script.
        check_references(references, rouge_tokens, "the samples", lambda line: None)
    texts = [text for sample in tokenized for text in sample.texts]
    arrays = {
        "ids": _smallest(np.concatenate(texts)),
        "text_start": _starts(len(text) for text in texts),
        "sample_start": _starts(len(sample.texts) for sample in tokenized),
        "candidate_start": _starts(len(sample.candidates) for sample in tokenized),
        "candidate_text": np.concatenate([np.array(sample.candidates, dtype=np.int64) for sample in tokenized]),
        "score": np.concatenate([np.array(sample.scores, dtype=np.float32) for sample in tokenized]),
    }
    for name in ("rouge", "agreement", "likelihood"):
        if all(getattr(sample, name) is not None for sample in tokenized):
            arrays[name] = np.concatenate([getattr(sample, name) for sample in tokenized])
    return arrays


def _tokenize_chunk(samples, encoding, max_num, rouge_tokens):
    """Yield a TokenizedSample for each of the samples; their texts are tokenized together."""
    documents = encoding.documents([" ".join(sample["article_untok"]) for sample in samples])
    summaries = [
        [each["abstract_untok"], *(text for text, _ in each["candidates_untok"][:max_num])] for each in samples
    ]
    encoded = iter(encoding.summaries([" ".join(text) for texts in summaries for text in texts]))
    figures = _figures_of(samples, max_num, rouge_tokens) if rouge_tokens else itertools.repeat((None, None))
    for sample, document, texts, (rouge, alike) in zip(samples, documents, summaries, figures, strict=False):
        reference, *candidates = map(tuple, itertools.islice(encoded, len(texts)))
        place = {text: place for place, text in enumerate(dict.fromkeys([reference, *candidates]), 1)}
        yield TokenizedSample(
            [np.array(text, dtype=np.int32) for text in (document, *place)],
            [place[text] for text in candidates],
            [score for _, score in sample["candidates"][:max_num]],
            rouge,
            alike,
            np.array(sample["likelihood"][:max_num], dtype=np.float32) if "likelihood" in sample else None,
        )


def _figures_of(samples, max_num, tokens):
    for sample in samples:
        candidates = [text for text, _ in sample["candidates"][:max_num]]
        figures = score(sample["abstract"], candidates, tokens), agreement(candidates, tokens)
        yield tuple(each.astype(np.float32) for each in figures)


def _starts(counts):
    return np.concatenate([[0], np.cumsum(list(counts))]).astype(np.int64)


def _smallest(ids):
    return ids.astype(np.uint16) if ids.max() < 2**16 else ids


def load_samples(folder, encoding, max_num, rouge_tokens, device_type, dtype=None, say=print, keep=True):
    """The SampleSet of a sample folder, read from the token file next to it if that is up to date, else made anew.

    The file's name depends on the tokenizer, the lengths, `max_num` and `rouge_tokens` (see `tokenize_samples`). It is
    up to date as long as every sample has the name, size and modification time of when it was made. keep: whether to
    write the file.
    """
    folder = Path(folder)
    files = sample_files(folder)
    settings = [FORMAT, encoding.fingerprint, encoding.total_len, encoding.max_len, max_num, rouge_tokens]
    settings += [encoding.settings_digest] * (encoding.settings_digest is not None)
    path = folder.parent / f"{folder.name}-{_digest(json.dumps(settings))}.tokens"
    stats = [(file.name, file.stat()) for file in files]
    fingerprint = _digest(json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]))
    arrays = _read_arrays(path, fingerprint)
    if arrays is None:
        say(f"tokenizing {len(files)} samples" + f": {path}" * keep)
        samples = map(read_sample, tqdm(files, unit=" samples", leave=False, disable=not sys.stderr.isatty()))
        arrays = tokenize_samples(samples, encoding, max_num, rouge_tokens)
        if keep:
            with atomic_write(path) as file:
                file.write(safetensors.numpy.save(arrays, {"samples": fingerprint}))
            arrays = _read_arrays(path, fingerprint)
    return SampleSet(arrays, encoding, device_type, dtype)


def _read_arrays(path, fingerprint):
    """The arrays of a token file; None if it is missing, damaged or of other samples."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # "numpy" would copy instead of mapping the file.
            if (file.metadata() or {}).get("samples") == fingerprint:
                return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, safetensors.SafetensorError):
        pass
    return None


# ---------------------------------------------------------------------------------------------------- batches


class LengthBatches(EpochBatches):
    """EpochBatches whose batches contain documents of similar length.

    lengths: int [samples]. accumulate: batches per update; the last update of an epoch may have fewer. updates: the
    optimizer's updates per epoch.
    """

    def __init__(self, lengths, batch_size, accumulate, seed, rank=0, world_size=1):
        super().__init__(len(lengths), batch_size, seed, rank, world_size)
        self.lengths, self.accumulate = lengths, accumulate
        self.number_of_batches = len(self)
        self.updates = -(-self.number_of_batches // accumulate)

    def order(self):
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.size)
        pool = POOL * self.batch_size
        for start in range(0, self.size, pool):
            part = order[start : start + pool]
            order[start : start + pool] = part[np.argsort(self.lengths[part], kind="stable")]
        whole = self.size // self.batch_size * self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        return np.concatenate([random.permutation(batches).ravel(), order[whole:]])

    def starts_update(self, number):
        return number % self.accumulate == 0

    def ends_update(self, number):
        return (number + 1) % self.accumulate == 0 or number + 1 == self.number_of_batches

    def weight(self, number):
        """The factor for this process's mean loss over batch `number`. With it, the mean over processes, summed over an
        update's batches, is the mean over the update's samples."""
        per_update = self.batch_size * self.accumulate
        in_update = min(per_update, self.size - number // self.accumulate * per_update)
        in_batch = min(self.batch_size, self.size - number * self.batch_size)
        return super().weight(number) * in_batch / in_update


def training_batches(args, world, dataset):
    """(the LengthBatches of this process, the DataLoader that yields `dataset.batch` of each)"""
    lengths = dataset.document_lengths
    batches = LengthBatches(lengths, args.batch_size, args.accumulate_step, args.seed, world.rank, world.size)
    return batches, worker_loader(dataset, batches, args.num_workers, world.device, dataset.batch, say=world.say)
