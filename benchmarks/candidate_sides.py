"""What the benchmarks of generated candidates share: what is searched, and the sides of a comparison."""

import time
from statistics import mean

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from search.generator import length_batches, load_generator

LONGEST = 512
PAD, END = 0, 1
NEEDS = "torch and transformers 4.56.2"


def make_cases(args, train, texts, folder):
    """Yield (name, the model's folder, the token ids of each document)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=32000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((document.text for document in train[:3000]), trainer)
    sources = [encoding.ids[: LONGEST - 1] + [END] for encoding in tokenizer.encode_batch(texts)]
    tokens = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
    bart = {"d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    random_models = {
        "t5-small shape": transformers.T5ForConditionalGeneration(transformers.T5Config(**tokens)),
        "bart kind": transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=32000, max_position_embeddings=LONGEST, **bart, **heads, **tokens)
        ),
    }
    generator = torch.Generator().manual_seed(0)
    for name, model in random_models.items():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Logits of unit size, and sharper attention than at initialisation, make near ties rare.
                scale = 1.0 if parameter.shape[0] == model.config.vocab_size else parameter.shape[1] ** -0.5
                torch.nn.init.normal_(parameter, std=scale, generator=generator)
        model.save_pretrained(folder / name)
        yield name, folder / name, sources
    if args.model:
        own, tokenizer = load_generator(args.model)
        own.save_pretrained(folder / "own")
        yield args.model, folder / "own", tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]


def shared(some, others):
    """The share of the documents' candidates `others` that are among `some`."""
    pairs = zip(some, others, strict=True)
    return mean(
        len(set(map(tuple, ours)) & set(map(tuple, theirs))) / len(set(map(tuple, theirs))) for ours, theirs in pairs
    )


def run_ours(search, sources, size):
    """(seconds, the unpadded candidates of each document)."""
    tokens = [None] * len(sources)
    started = time.perf_counter()
    for places in length_batches(sources, size):
        lengths = torch.tensor([len(sources[place]) for place in places]).unsqueeze(1)
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        input_ids = torch.full(mask.shape, search.pad_token)
        input_ids[mask.bool()] = torch.tensor([token for place in places for token in sources[place]])
        for place, some in zip(places, search(input_ids, mask)[0].tolist(), strict=True):
            tokens[place] = some
    return time.perf_counter() - started, [strip(some, search.pad_token) for some in tokens]


def strip(candidates, pad):
    """The candidates without their trailing padding, whose length depends on the batch."""
    return [candidate[: max(i for i, token in enumerate(candidate) if i == 0 or token != pad) + 1]
            for candidate in candidates]  # fmt: skip


def run_reference(reference, sources, batches, request, pad):
    """(seconds, the unpadded candidates of each document), from candidates_reference.py.

    batches: lists of indices into `sources`. request: the other fields of that script's request. pad: the pad token id.
    """
    order = [place for places in batches for place in places]
    answer = reference.ask(request | {"batches": [[sources[place] for place in places] for places in batches]})
    tokens = dict(zip(order, answer["tokens"], strict=True))
    return answer["seconds"], [strip(tokens[place], pad) for place in range(len(sources))]
