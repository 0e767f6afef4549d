"""The smallest real inputs of every script: pictures, a CSV, models in `from_pretrained` form, candidates, samples."""

import csv
import json
import random
import sys
from pathlib import Path

import numpy as np

TEXT = """
    return the sum of a list open file read lines write bytes parse string make new object copy array sort keys find
    index compute mean value set flag close socket send data wait for lock run process stop thread join path name
"""
WORDS = TEXT.split()
SPECIAL_TOKENS = {
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
    "roberta": {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"},
}


def make_pictures(folder):
    """A folder data set of 44 training and 10 test pictures in two classes that a model can tell apart."""
    from PIL import Image

    draws = np.random.default_rng(0)
    for split, count in (("train", 22), ("test", 5)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(0, 128, (32, 32, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


def make_table(path, documents=60):
    """A CSV of documents of random words, of different lengths; the summary is the first of them."""
    draw = random.Random(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["abstract", "title"])
        for number in range(documents):
            words = draw.choices(WORDS, k=draw.randint(5, 40))
            writer.writerow([f"{' '.join(words)} {number}.", " ".join(words[:4])])
    return path


def make_model(folder, kind, dropout=0.0):
    """A random model of two layers and its tokenizer: kind "t5" (a generator), "bert" or "roberta".

    dropout: of t5; the others have their usual one.
    """
    import torch

    from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5ForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    t5_size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2, "dropout_rate": dropout}
    t5_size |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = {
        "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=400, **t5_size)),
        "bert": lambda: BertModel(BertConfig(vocab_size=400, max_position_embeddings=64, **size)),
        "roberta": lambda: RobertaModel(
            RobertaConfig(vocab_size=400, max_position_embeddings=64, pad_token_id=1, **size)
        ),
    }[kind]()
    model.save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return folder


def make_tokenizer(kind):
    """A byte-level tokenizer of a few hundred tokens, with the special tokens of the `kind` of model."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL_TOKENS[kind]
    tokenizer = ByteLevelBPETokenizer()
    words = [" ".join(WORDS)] * 3
    tokenizer.train_from_iterator(words, vocab_size=400, special_tokens=list(special.values()), show_progress=False)
    first, last = special.get("cls_token"), special.get("sep_token", special.get("eos_token"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=" ".join(token for token in (first, "$A", last) if token),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last) if token],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)


def make_samples(folder):
    """A folder of samples as preprocess.py writes them, train (44), val (12) and test (12), six candidates each: words
    of the reference with more and more others, in no order."""
    from texts.rouge_scores import mean_score, score

    draws = np.random.default_rng(0)
    for split, count in (("train", 44), ("val", 12), ("test", 12)):
        (folder / split).mkdir(parents=True)
        for index in range(count):
            reference = list(draws.choice(WORDS, 6))
            article = reference + list(draws.choice(WORDS, draws.integers(5, 40)))
            candidates = [
                " ".join([*draws.choice(reference, kept), *draws.choice(WORDS, 6 - kept)])
                for kept in draws.integers(0, 7, 6)
            ]
            scores = mean_score(score([" ".join(reference)], [[text] for text in candidates]))
            candidates = [[[text], float(mean)] for text, mean in zip(candidates, scores, strict=True)]
            text = {"article": [" ".join(article)], "abstract": [" ".join(reference)]}
            sample = text | {f"{key}_untok": value for key, value in text.items()}
            sample |= {"candidates": candidates, "candidates_untok": candidates}
            (folder / split / f"{index}.json").write_text(json.dumps(sample))
    return folder


def make_candidates(folder, documents, candidates, split="train"):
    """The six candidate text files of one split."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)

    def line():
        return " ".join(draw.choices(WORDS, k=draw.randint(5, 30))).capitalize() + " ."

    for field, count in (("source", documents), ("target", documents), ("out", documents * candidates)):
        text = "".join(line() + "\n" for _ in range(count))
        for suffix in ("", ".tokenized"):
            (folder / f"{split}.{field}{suffix}").write_text(text, encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    make_model(sys.argv[1], sys.argv[2], float(sys.argv[3]))
