"""Bad input of every kind, on disk, for the table of bad_inputs.py."""

import bz2
import gzip
import json
import os
import shutil
import sqlite3
import struct
import zlib

import tiny_inputs
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from models.resnext import ResNeXt


class Mark:
    """Pickled, it makes a file when it is loaded by a loader that runs code."""

    def __reduce__(self):
        return (open, ("the-pickle-ran", "w"))


def make_bad_files(good, bad):
    make_pictures(good / "pictures", bad / "pictures")
    make_tables(bad / "tables")
    make_models(good, bad / "models")
    make_candidates(good / "candidates", bad / "candidates")
    make_samples(good / "samples", bad / "samples")
    make_traces(bad / "traces")
    make_records(bad / "records")
    make_resnext_weights(bad / "weights")


def make_pictures(good, bad):
    changes = {
        "text": ("train/dark/0.png", b"no picture"),
        "cut": ("test/light/0.png", (good / "test/light/0.png").read_bytes()[:900]),
        "empty": ("train/light/1.png", b""),
        "bomb": ("train/dark/0.png", _huge_png(60_000, 60_000)),
    }
    for name, (path, content) in changes.items():
        shutil.copytree(good, bad / name)
        (bad / name / path).write_bytes(content)
    for name in ("no_picture", "lost_class", "float", "pipe"):
        shutil.copytree(good, bad / name)
    for path in (bad / "no_picture/train/light").iterdir():
        path.rename(path.with_suffix(".txt"))
    shutil.rmtree(bad / "lost_class/test/light")
    for split in ("train", "test"):
        shutil.copytree(good / split / "dark", bad / "one_class" / split / "dark")
    Image.new("F", (32, 32)).save(bad / "float/train/dark/0.tif")
    (bad / "pipe/test/dark/0.png").unlink()
    os.mkfifo(bad / "pipe/test/dark/0.png")
    shutil.copytree(good, bad / "other_class")
    shutil.copytree(good / "test/dark", bad / "other_class/test/new")
    shutil.copytree(good / "train", bad / "no_test/train")
    (bad / "no_classes/train").mkdir(parents=True)


def _huge_png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_tables(folder):
    rows = [f"text number {index},summary {index}" for index in range(20)]
    texts = {
        "empty.csv": "",
        "blank.csv": " \n \n",
        "columns.csv": "\n".join(["body,headline", *rows]),
        "few.csv": "\n".join(["abstract,title", *rows[:9]]),
        "same.csv": "\n".join(["abstract,title", *(f"text,summary {index}" for index in range(20))]),
        "quote.csv": "\n".join(["abstract,title", rows[0], 'an "open quote, "that never ends', '"x', *rows]),
        "semicolons.csv": "\n".join(["abstract;title", *rows]),
        "doubled.csv": "\n".join(["abstract,abstract,title", *(f"short,{row}" for row in rows)]),
    }
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "shifted.csv").write_text("\n".join(["abstract,title", *rows[:6], "a, b and c,title", *rows]))
    (folder / "chinese.csv").write_text(
        "\n".join(["abstract,title", *(f"文本 {row},猫坐在垫子上 {row}" for row in range(20))])
    )
    lines = [b"abstract,title", *(row.encode() for row in rows)]
    lines[7] = b"caf\xe9,title"
    (folder / "latin.csv").write_bytes(b"\n".join(lines))
    (folder / "packed.csv").write_bytes(bz2.compress(texts["few.csv"].encode()))
    (folder / "short.csv").write_text("number,abstract\n1,one text\n2\n")
    (folder / "cut.csv.gz").write_bytes(gzip.compress(texts["few.csv"].encode())[:-9])


def make_models(good, folder):
    for name in ("hostile", "remote", "damaged", "no_tokenizer", "bad_config"):
        shutil.copytree(good / "t5", folder / name)
    (folder / "hostile/model.safetensors").unlink()
    torch.save({"shared.weight": Mark()}, folder / "hostile/pytorch_model.bin")
    (folder / "damaged/model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken")
    for path in folder.glob("no_tokenizer/tokenizer*"):
        path.unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(good / "t5")
    tokenizer.add_tokens([f"word{number}" for number in range(400)])
    shutil.copytree(good / "t5", folder / "tokens")
    tokenizer.save_pretrained(folder / "tokens")
    configs = {"penalty": {"length_penalty": 2.0}, "sequences": {"num_return_sequences": 4}}
    configs |= {"end": {"eos_token_id": [1, 400]}, "never": {"suppress_tokens": [-1]}, "length": {"max_length": 0}}
    configs |= {"start": {"decoder_start_token_id": 5}, "starts": {"decoder_start_token_id": [3, 4]}}
    configs |= {"endless": {"eos_token_id": None}}
    for name, config in configs.items():
        shutil.copytree(good / "t5", folder / name)
        usual = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        (folder / name / "generation_config.json").write_text(json.dumps(usual | config))
    changes = {"layers": ("t5", "config", {"num_decoder_layers": 1})}
    changes |= {"encoder_layers": ("bert", "config", {"num_hidden_layers": 1})}
    changes |= {"epsilon": ("t5", "config", {"layer_norm_epsilon": float("nan")})}
    changes |= {"distance": ("t5", "config", {"relative_attention_max_distance": 4})}
    changes |= {"documents": ("t5", "tokenizer_config", {"model_max_length": 64.5})}
    for name, (kind, file, change) in changes.items():
        shutil.copytree(good / kind, folder / name)
        path = folder / name / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    make_damaged_weights(good / "t5", folder)
    make_bart(folder / "bart")
    make_bart(folder / "bias", bias=float("nan"))
    (folder / "bad_config/config.json").write_text('{"model_type": "t5",')
    code = "open('the-pickle-ran', 'w')\nfrom transformers import T5Config as Config\n"
    (folder / "remote/evil.py").write_text(code)
    classes = ("AutoConfig", "AutoModelForSeq2SeqLM", "AutoModelForTextEncoding", "AutoModel")
    config = {"model_type": "evil", "auto_map": dict.fromkeys(classes, "evil.Config")}
    (folder / "remote/config.json").write_text(json.dumps(config))


def make_damaged_weights(good, folder):
    """Models that transformers loads without a word, and that are not what they were; and files that it cannot name."""
    for name in ("lacking", "renamed", "not_finite", "cut_config", "pointer", "empty_vocabulary", "adapter"):
        shutil.copytree(good, folder / name)
    weights = load_file(good / "model.safetensors")
    attention = [name for name in weights if name.startswith("decoder.block.0.layer.0.")]
    nan = weights["shared.weight"].clone()
    nan[7] = float("nan")
    changed = {
        "lacking": {name: value for name, value in weights.items() if name not in attention},
        "renamed": {f"model.{name}": value for name, value in weights.items()},
        "not_finite": weights | {"shared.weight": nan},
    }
    for name, content in changed.items():
        save_file(content, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / "cut_config/generation_config.json").write_text('{"num_beams": ')
    (folder / "pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (folder / "empty_vocabulary/spiece.model").write_bytes(b"")
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')


def make_bart(folder, bias=0.0):
    """A BART of 64 positions with the tokenizer of a RoBERTa, which is made alike. bias: of one token's logit."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16, "vocab_size": 400}
    model = BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **sizes))
    model.final_logits_bias[0, 7] = bias
    model.save_pretrained(folder)
    tiny_inputs.make_tokenizer("roberta").save_pretrained(folder)


def make_candidates(good, folder):
    for name in ("more", "latin", "empty", "missing"):
        shutil.copytree(good, folder / name)
    with open(folder / "more/train.out.tokenized", "a") as file:
        file.write("one more\n")
    lines = (folder / "latin/train.out").read_bytes().split(b"\n")
    lines[6] = b"caf\xe9"
    (folder / "latin/train.out").write_bytes(b"\n".join(lines))
    for path in (folder / "empty").iterdir():
        path.write_bytes(b"")
    (folder / "missing/train.target.tokenized").unlink()


def make_samples(good, folder):
    sample = json.loads((good / "train/3.json").read_text())
    changes = {
        "text": b"no JSON",
        "latin": b'{"article": ["caf\xe9"]}',
        "list": b"[]",
        "key": {name: value for name, value in sample.items() if name != "abstract_untok"},
        "sentences": sample | {"article": "one text"},
        "score": sample | {"candidates": [["one text", 1.0]]},
        "huge": sample | {"candidates": [[text, 1e308] for text, _ in sample["candidates"]]},
        "count": sample | {"candidates": sample["candidates"][:5]},
        "tied": sample
        | {name: [[text, 0.5] for text, _ in sample[name]] for name in ("candidates", "candidates_untok")},
        "no_candidates": sample | {"candidates": [], "candidates_untok": []},
    }
    for name, content in changes.items():
        (folder / name / "train").mkdir(parents=True)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name / "train/3.json").write_bytes(content)
        (folder / name / "val").symlink_to(good / "val")
    (folder / "all_tied").mkdir()
    (folder / "all_tied/train").symlink_to(folder / "tied/train")
    (folder / "all_tied/val").mkdir()
    shutil.copy(folder / "tied/train/3.json", folder / "all_tied/val/4.json")
    (folder / "chinese/val").mkdir(parents=True)
    (folder / "chinese/train").symlink_to(good / "train")
    (folder / "chinese/val/3.json").write_text(json.dumps(sample | {"abstract": ["猫坐在垫子上"]}))
    (folder / "none/train").mkdir(parents=True)
    (folder / "none/train/notes.txt").write_text("no sample")


def make_traces(folder):
    folder.mkdir()
    (folder / "text").write_text("no database")
    (folder / "cut").write_bytes(b"SQLite format 3\0" + bytes(range(200)))
    (folder / "empty").write_bytes(b"")
    for name, statement in {
        "other": "CREATE TABLE some (thing INT)",
        "no_steps": "CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, globalTid INT)",
    }.items():
        with sqlite3.connect(folder / name) as database:
            database.execute(statement)


def make_records(folder):
    folder.mkdir()
    record = {"format": 1, "experiment": "resnext", "arguments": {}, "machine": {}, "epochs": []}
    contents = {
        "text": "{",
        "list": "[]",
        "format": json.dumps(record | {"format": 99}),
        "no_epochs": json.dumps(record),
    }
    for name, text in contents.items():
        (folder / f"{name}.json").write_text(text)


def make_resnext_weights(folder):
    """Weights of two classes: without a record, with a torn one, and with one."""
    folder.mkdir()
    data = {"classes": ["dark", "light"], "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    records = {"torn": "{", "whole": json.dumps({"arguments": {"dataset": "folder"}, "data": data})}
    for name in ("alone", "torn", "whole"):
        torch.save(ResNeXt(1, 4, num_classes=2).state_dict(), folder / f"{name}.pt")
        if name in records:
            (folder / f"{name}.json").write_text(records[name])


def make_weights(good, cache):
    """Scorers below the folder `cache`: a copy of `good`/scorer, and bad ones in all ways."""
    for name in ("good", "other", "plain", "hostile", "empty", "torn"):
        shutil.copytree(good / "scorer", cache / name)
    (cache / "other/scorer.json").write_text(json.dumps({"encoder": str(good / "bert"), "architecture": "bert"}))
    torch.save({"weight": torch.zeros(3)}, cache / "plain/scorer.bin")
    torch.save({"encoder.shared.weight": Mark()}, cache / "hostile/scorer.bin")
    (cache / "empty/scorer.bin").write_bytes(b"")
    (cache / "torn/scorer.json").write_text("{")
