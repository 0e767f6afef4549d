"""The speed-up of candidate generation over transformers 4.56.2, with equal tokens. Targets: TARGETS.

    python3 benchmarks/candidates.py --data pubmed_abstracts.csv.gz --reference_python /path/of/venv/bin/python

Three models generate 8 candidates per document, with one group per beam: one of T5-small's shape with random weights
(its candidates never end by themselves), a small BART with random weights, and the generator given with --model, if
any. The arms:

    original    transformers 4.56.2, documents in file order, in batches of 32, all padded to 512 tokens
    sorted      transformers 4.56.2, documents sorted by length, padded to the longest of the batch
    ours        DiverseBeamSearch, documents sorted by length
    bfloat16    the same in bfloat16, if the processor supports it

Batches of 32 are the original's default. On a CPU smaller ones are faster: --original_batch 1 shows `original` at its
best.

The reference runs in a separate interpreter, whose environment has transformers 4.56.2; without --reference_python, it
is the same algorithm reimplemented on the installed version's modules. Before the timing, all arms in single precision
must give equal tokens; for bfloat16, the record has the share of these candidates that it finds, too.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import CPU, Reference, check, finish, get_parser, interleaved, new_record, ratio_summary

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import torch
import transformers
from candidates_reference import DIVERSITY_PENALTY
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from harness import arguments, endings
from harness.machine import multiplies_bfloat16
from search.diverse_beam import DiverseBeamSearch
from search.generator import length_batches, load_generator
from texts.documents import find_dataset, read_documents, split_documents

LONGEST = 512
PAD, END = 0, 1
NEEDS = "torch and transformers 4.56.2"
TARGETS = {
    "cpu": {
        "t5-small shape, original": ("at least", 8.0),
        "t5-small shape, original against bfloat16": ("at least", 8.0),
        "t5-small shape, sorted": ("at least", 2.5),
        "bart kind, sorted": ("at least", 2.5),
    }
}


def get_args_parser():
    parser = get_parser(__doc__, "candidates", rounds=6)
    integer = arguments.positive_int
    parser.add_argument("--data", default="sample", help="CSV file or data set name")
    parser.add_argument("--documents", type=integer, default=16, help="documents of the test split")
    parser.add_argument("--generator_name", "--model", dest="model", help="folder of a generator to time as well")
    parser.add_argument("--reference_python", default=sys.executable, help="interpreter that has transformers 4.56.2")
    parser.add_argument("--num_cands", type=integer, default=8, help="candidates per document")
    parser.add_argument("--decoder_max_len", type=integer, default=64, help="maximum tokens of a candidate")
    parser.add_argument("--batch", type=integer, default=16, help="documents per batch of ours")
    parser.add_argument("--original_batch", type=integer, default=32, help="documents per batch of the original")
    parser.add_argument(
        "--reference_batch", type=integer, default=4, help="documents per batch of the sorted reference; 4 is its best"
    )
    return parser


def main():
    args = get_args_parser().parse_args()
    documents = split_documents(read_documents(find_dataset(args.data)))
    texts = [document.text for document in documents["test"][: args.documents]]
    reference = Reference(args.reference_python, "candidates_reference.py", needs=NEEDS)
    with tempfile.TemporaryDirectory() as folder, reference:
        print(f"reference: {reference.name}; {torch.get_num_threads()} threads", flush=True)
        results = {}
        for name, model_folder, sources in make_cases(args, documents["train"], texts, Path(folder)):
            results[name] = time_case(name, model_folder, sources, reference, args)
        record = new_record(
            "candidates",
            CPU,
            reference=reference.name,
            candidates=args.num_cands,
            decoder_max_len=args.decoder_max_len,
            batches={"original": args.original_batch, "sorted": args.reference_batch, "ours": args.batch},
            documents=len(texts),
            results=results,
        )
    finish(record, args)


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


def time_case(name, model_folder, sources, reference, args):
    """Check that all arms give equal tokens, then time them in turn."""
    searches = {"ours": torch.float32} | ({"bfloat16": torch.bfloat16} if multiplies_bfloat16() else {})
    searches = {arm: make_search(model_folder, dtype, args) for arm, dtype in searches.items()}
    request = {"model": str(model_folder), "num_cands": args.num_cands, "max_length": args.decoder_max_len}
    places, size = range(len(sources)), args.original_batch
    as_they_come = [places[start : start + size] for start in range(0, len(places), size)]
    by_length, pad = length_batches(sources, args.reference_batch), searches["ours"].pad_token
    arms = {
        "original": lambda: run_reference(reference, sources, as_they_come, request | {"pad_to": LONGEST}, pad),
        "sorted": lambda: run_reference(reference, sources, by_length, request | {"pad_to": None}, pad),
        **{arm: lambda search=search: run_ours(search, sources, args.batch) for arm, search in searches.items()},
    }
    outputs = {arm: run()[1] for arm, run in arms.items()}
    for arm in ("original", "sorted"):
        equal = sum(a == b for a, b in zip(outputs[arm], outputs["ours"], strict=True))
        print(f"{name}: the tokens of {equal} of {len(sources)} documents equal those of {arm}", flush=True)
        check(equal == len(sources), f"{name}: the tokens differ from those of {arm}")
    same = {arm: shared(outputs[arm], outputs["ours"]) for arm in searches if arm != "ours"}
    for arm, share in same.items():
        print(f"{name}: {arm} finds {100 * share:.0f} % of the candidates of single precision", flush=True)
    # The reference's seconds are measured inside its process.
    seconds = interleaved({arm: lambda run=run: run()[0] for arm, run in arms.items()}, args.rounds)
    lengths = [len(candidate) for some in outputs["ours"] for candidate in some]
    return {
        "mean_source_tokens": sum(map(len, sources)) / len(sources),
        "mean_candidate_tokens": sum(lengths) / len(lengths),
        "seconds": seconds,
        "documents_per_second": {arm: len(sources) / median(times) for arm, times in seconds.items()},
        "same_candidates": same,
        "ratios": {
            f"{theirs}{against}": ratio_summary(seconds[theirs], seconds[ours])
            for ours, against in (("ours", ""), ("bfloat16", " against bfloat16"))
            if ours in searches
            for theirs in ("original", "sorted")
        },
    }


def make_search(model_folder, dtype, args):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(model_folder, dtype=dtype).eval()
    return DiverseBeamSearch(
        model,
        num_beams=args.num_cands,
        num_groups=args.num_cands,
        diversity_penalty=DIVERSITY_PENALTY,
        max_length=args.decoder_max_len,
        min_length=model.generation_config.min_length or 0,
        no_repeat_ngram_size=model.generation_config.no_repeat_ngram_size or 0,
    )


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


if __name__ == "__main__":
    endings.run(main)
