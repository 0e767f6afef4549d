"""The scorer's weight files: which are loaded, and which are refused."""

import os
import pickle

import pytest
import torch
from model import load_encoder, load_scorer, save_scorer
from scorer_experiment import cached_path

from harness.command_line import UserError


def test_weights_of_another_encoder_are_refused(encoders, tmp_path):
    scorer, _, description = load_scorer(encoders["t5"], total_len=60, max_len=20)
    path = tmp_path / "scorer.bin"
    save_scorer(path, scorer, description)
    again, encoding, _ = load_scorer(weights=path)
    assert (encoding.total_len, encoding.max_len) == (60, 20)
    assert all(torch.equal(one, other) for one, other in zip(scorer.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError) as error:
        load_scorer(encoders["bert"], path)
    assert str(encoders["t5"]) in str(error.value)
    assert str(encoders["bert"]) in str(error.value)
    (tmp_path / "scorer.json").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_scorer(encoders["bert"], path)


def test_published_weights_load(encoders, tmp_path):
    scorer = load_scorer(encoders["roberta"])[0]
    extra = {"encoder.pooler.dense.weight": torch.ones(3), "encoder.embeddings.position_ids": torch.arange(4)}
    torch.save(scorer.state_dict() | extra, tmp_path / "model_cnndm.bin")
    load_scorer(encoders["roberta"], tmp_path / "model_cnndm.bin")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_hostile_weights_do_not_run(encoders, tmp_path):
    path = tmp_path / "scorer.bin"
    torch.save({"encoder": Hostile(tmp_path / "mark")}, path)
    with pytest.raises(UserError):
        load_scorer(encoders["t5"], path)
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    with pytest.raises(UserError):
        load_scorer(encoders["t5"], path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/hostname", "run/../../secret.bin", "run/none.bin"])
def test_weights_outside_the_cache_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache" / "run").mkdir(parents=True)
    (tmp_path / "cache" / "run" / "scorer.bin").write_bytes(b"")
    (tmp_path / "secret.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"run/scorer\.bin"):
        cached_path(name)


def test_encoder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"create_model\.py"):
        load_encoder(str(tmp_path))
