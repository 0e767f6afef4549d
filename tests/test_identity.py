"""What a model computes is part of what it is known by: its config.json, and the settings of its tokenizer."""

import json
import shutil
import sys
from types import SimpleNamespace

import gen_candidate
import pytest
import tiny_inputs
from data_utils import TextEncoding
from transformers import BertConfig, T5Config
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from harness.endings import UserError
from pretrained.model_folders import computation, tokenizer_settings, tokenizer_text
from search.generator import is_of, load_generator
from search.identity import config_digest, fingerprint
from texts import provenance

COMMAND = ["--generator_name", "t5", "--dataset_name", "papers.csv", "--num_cands", "2", "--decoder_max_len", "5"]


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(path, *names):
    """Make a JSON file one of those that lack these names."""
    path.write_text(
        json.dumps({name: each for name, each in json.loads(path.read_text()).items() if name not in names})
    )


def test_names_types_and_what_only_training_uses_are_no_part_of_the_computation():
    plain = computation(BertConfig())
    unused = {"hidden_dropout_prob": 0.5, "architectures": ["A"], "use_cache": False, "chunk_size_feed_forward": 2}
    assert computation(BertConfig(**unused, dtype="float16", name_or_path="x", initializer_range=1.0)) == plain
    assert computation(BertConfig(id2label={0: "x"}, classifier_dropout=0.5, output_attentions=True)) == plain
    for name, value in {"hidden_act": "relu", "num_attention_heads": 4, "layer_norm_eps": 1e-3}.items():
        assert computation(BertConfig(**{name: value})) == plain | {name: value}
    assert computation(T5Config()) != computation(T5Config(feed_forward_proj="gelu"))


def test_candidates_of_a_generator_that_computes_otherwise_are_others(tmp_path, monkeypatch, capsys):
    tiny_inputs.make_model(tmp_path / "t5", "t5")
    tiny_inputs.make_table(tmp_path / "papers.csv")
    monkeypatch.chdir(tmp_path)

    def again(**changes):
        change(tmp_path / "t5/config.json", **changes)
        monkeypatch.setattr(sys, "argv", ["gen_candidate.py", *COMMAND])
        gen_candidate.main()
        return capsys.readouterr().out

    assert "documents/s" in again()
    again(architectures=["Another"], dropout_rate=0.5, use_cache=False, transformers_version="1")
    made = provenance.read(tmp_path / "candidates/t5_2")
    with pytest.raises(UserError, match=r"made with other settings \(config\); choose"):
        again(feed_forward_proj="gelu")
    model, tokenizer = load_generator("t5")
    assert fingerprint(model, tokenizer) == made["generator"]
    assert not is_of(model, tokenizer, {"candidates": made})
    # Files from before the config was kept are not compared, and stay as they are.
    for path in (tmp_path / "candidates/t5_2").glob("*.json"):
        without(path, "config")
    before = provenance.read(tmp_path / "candidates/t5_2")
    assert "already exist" in again()
    assert provenance.read(tmp_path / "candidates/t5_2") == before
    assert is_of(model, tokenizer, {"candidates": before})
    assert made["config"] != config_digest(model)


def test_a_slow_tokenizer_is_known_by_its_settings_and_files(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "read", "Read", "##er"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerLegacy(str(tmp_path / "vocab.txt"), do_lower_case=True).save_pretrained(tmp_path)

    def known(**settings):
        tokenizer = BertTokenizerLegacy.from_pretrained(tmp_path, **settings)
        encoding = TextEncoding(tokenizer, 9, 9)
        return tokenizer_text(tokenizer), encoding.fingerprint, tokenizer_settings(tokenizer), encoding.settings_digest

    plain = known()
    assert known(model_max_length=7, padding_side="left") == plain
    for changed in (known(do_lower_case=False), known(never_split=["Read"])):
        assert [one == other for one, other in zip(plain, changed, strict=True)] == [True, True, False, False]
    elsewhere = shutil.copytree(tmp_path, tmp_path / "copy")
    assert tokenizer_settings(BertTokenizerLegacy.from_pretrained(elsewhere)) == plain[2]
    tokenizer = BertTokenizerLegacy.from_pretrained(tmp_path)
    tokenizer.sp_model = SimpleNamespace(serialized_model_proto=lambda: b"as of sentencepiece")
    assert tokenizer_settings(tokenizer) != plain[2]
    assert tokenizer_settings(tiny_inputs.make_tokenizer("bert")) is None
    assert TextEncoding(tiny_inputs.make_tokenizer("bert"), 9, 9).settings_digest is None
