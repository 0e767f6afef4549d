"""What the tests share: running a script as a user does, and small real data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "resnext", ROOT / "SimCLS"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from harness import torchvision_compat  # noqa: F401

# One thread a process: the tests run two at a time on two cores, and tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# They assert what a CPU gives, bit for bit; what needs a GPU is measured by the benchmarks.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def script_command(script, *args):
    return [sys.executable, str(ROOT / script), *map(str, args)]


@pytest.fixture(scope="session")
def run_script():
    """run_script("resnext/resnext.py", "--seed", 1, cwd=..., code=0) -> CompletedProcess with text output."""

    def run(script, *args, cwd=None, code=0, **env):
        result = subprocess.run(
            script_command(script, *args), cwd=cwd, capture_output=True, text=True, env=os.environ | env, timeout=300
        )
        assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder data set of 44 training and 10 test pictures in two classes that a model can tell apart."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 22), ("test", 5)):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 128, (32, 32, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Tiny text encoders in `from_pretrained` form, as users have them: {"t5" (without dropout), "bert", "roberta"}."""
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5ForConditionalGeneration

    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    models = {
        "t5": T5ForConditionalGeneration(
            T5Config(
                vocab_size=400,
                d_model=32,
                d_kv=16,
                d_ff=64,
                num_heads=2,
                num_layers=2,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        ),
        "bert": BertModel(BertConfig(vocab_size=400, max_position_embeddings=64, **size)),
        "roberta": RobertaModel(RobertaConfig(vocab_size=400, max_position_embeddings=64, pad_token_id=1, **size)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        _tokenizer(name).save_pretrained(folders[name])
    return folders


def _tokenizer(kind):
    """A byte-level tokenizer of a few hundred tokens, with the special tokens of the `kind` of model."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = {
        "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
        "roberta": {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"},
    }[kind]
    tokenizer = ByteLevelBPETokenizer()
    words = [" ".join(WORDS)] * 3
    tokenizer.train_from_iterator(words, vocab_size=400, special_tokens=list(special.values()), show_progress=False)
    first, last = special.get("cls_token"), special.get("sep_token", special.get("eos_token"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=" ".join(token for token in (first, "$A", last) if token),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last) if token],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)


TEXT = """
    return the sum of a list open file read lines write bytes parse string make new object copy array sort keys find
    index compute mean value set flag close socket send data wait for lock run process stop thread join path name
"""
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    """A folder of samples as preprocess.py writes them, train (44), val (12) and test (12), six candidates each: words
    of the reference with more and more others, in no order."""
    from fast_rouge import RougeReference

    folder = tmp_path_factory.mktemp("samples")
    random = np.random.default_rng(0)
    for split, count in (("train", 44), ("val", 12), ("test", 12)):
        (folder / split).mkdir()
        for index in range(count):
            reference = list(random.choice(WORDS, 6))
            article = reference + list(random.choice(WORDS, random.integers(5, 40)))
            candidates = [
                " ".join([*random.choice(reference, kept), *random.choice(WORDS, 6 - kept)])
                for kept in random.integers(0, 7, 6)
            ]
            oracle = RougeReference([" ".join(reference)])
            candidates = [[[text], oracle.score([text]).mean] for text in candidates]
            text = {"article": [" ".join(article)], "abstract": [" ".join(reference)]}
            sample = text | {f"{key}_untok": value for key, value in text.items()}
            sample |= {"candidates": candidates, "candidates_untok": candidates}
            (folder / split / f"{index}.json").write_text(json.dumps(sample))
    return folder
