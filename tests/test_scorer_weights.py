"""The scorer's weight files: which are loaded, and which are refused."""

import json
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch
from data_utils import LengthBatches
from main import load_model
from model import check_reads_on, load_encoder, load_scorer, read_description, save_scorer
from transformers import AutoTokenizer, BertModel

from harness.distributed import World
from harness.endings import UserError
from harness.epochs import Epoch
from harness.precision import choose_precision
from harness.resume import StopRequest, read_state
from harness.timing import PhaseTimer
from scorer.choices import score_candidates
from scorer.metrics import Metrics
from scorer.scorer_arguments import cached_path, get_args_parser
from scorer.scorer_run import ScorerRun
from texts.samples import read_sample, sample_files

CPU = torch.device("cpu")


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
    with pytest.raises(UserError, match="has no scorer weights"):
        load_scorer(encoders["bert"], path)


def test_published_weights_load(encoders, tmp_path):
    scorer = load_scorer(encoders["roberta"])[0]
    extra = {"encoder.pooler.dense.weight": torch.ones(3), "encoder.embeddings.position_ids": torch.arange(4)}
    torch.save(scorer.state_dict() | extra, tmp_path / "model_cnndm.bin")
    load_scorer(encoders["roberta"], tmp_path / "model_cnndm.bin")


@pytest.mark.parametrize(
    ("arguments", "lengths"),
    [(["--model_type", "t5"], (512, 120)), (["--model_pt", "run/scorer.bin"], (60, 20)),
     (["--model_pt", "run/scorer.bin", "--max_len", "30"], (60, 30))],
)  # fmt: skip
def test_lengths_are_those_of_the_weights_unless_they_are_given(encoders, tmp_path, monkeypatch, arguments, lengths):
    monkeypatch.chdir(tmp_path)
    scorer, _, description = load_scorer(encoders["t5"], total_len=60, max_len=20)
    save_scorer(tmp_path / "cache/run/scorer.bin", scorer, description)
    os.symlink(encoders["t5"], "t5")
    args = get_args_parser("").parse_args(arguments)
    load_model(args, World(0, 1, CPU))
    assert (args.total_len, args.max_len) == lengths


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run, begun, that has validated at update 3."""
    monkeypatch.chdir(tmp_path)
    scorer = torch.nn.Linear(2, 2)
    run = ScorerRun(get_args_parser("").parse_args(["--run_name", "x"]), World(0, 1, CPU), precision="fp32")
    run._updates_an_epoch, run.facts["peak_rate"] = 10, 1.0
    run._description, run.batches, run.stop = {"encoder": "x"}, LengthBatches([1] * 80, 4, 2, 0), StopRequest()
    run.stop.signal, run.phase = signal.SIGINT, PhaseTimer(CPU)
    run.add_validation(3, result_of(1.0), scorer)
    return run, scorer


def result_of(loss):
    return {"val_loss": loss} | {f"{whose}_rouge{kind}": 0.3 for whose in ("val", "first") for kind in "12L"}


def sums_of(good):
    """Metrics of 2 documents whose losses are all finite, or not."""
    metrics = Metrics(CPU)
    metrics.totals[:] = torch.tensor([2.0, 1.0 if good else float("nan"), 0.1])
    return metrics


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_log_of_a_resumed_run_keeps_what_its_state_knows_of(run):
    assert [run[0].logged_step(*position) for position in ((0, 7), (0, 8), (1, 0), (2, 2))] == [4, 4, 10, 21]


def test_of_equal_rouge_the_lower_loss_is_the_better(run):
    run, scorer = run
    for loss, is_best in ((2.0, False), (0.5, True), (0.7, False)):
        before = (run.folder / "scorer.bin").stat().st_mtime_ns
        run.add_validation(4, result_of(loss), scorer)
        assert ((run.folder / "scorer.bin").stat().st_mtime_ns > before) == is_best


@pytest.mark.parametrize(("loss", "good_sums"), [(float("nan"), True), (float("inf"), True), (1.0, False)])
def test_a_diverged_run_leaves_the_files_as_they_were(run, loss, good_sums):
    run, scorer = run
    (run.folder / "x.json").write_text("of an earlier run")
    before, run.state = files(run.folder), {"scorer": scorer, "metrics": sums_of(good_sums)}
    epoch = Epoch(run, 0, 20)
    epoch.step = 8
    for keep, more in ((run.keep_within_epoch, ()), (run.add_epoch, (0,))):
        with pytest.raises(UserError, match=r"loss became (nan|inf) in epoch 1: cache/x keeps .* of update 3; .* --lr"):
            keep(epoch, result_of(loss), *more)
        assert files(run.folder) == before


def test_a_model_whose_first_token_reads_nothing_behind_it_is_no_encoder(encoders, tmp_path):
    """As a decoder's: by it all texts would be the same."""
    model = BertModel.from_pretrained(encoders["bert"])
    model.config.is_decoder = True
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoders["bert"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not a text encoder"):
        load_encoder(str(tmp_path))


def test_short_memory_is_no_fault_of_the_encoder():
    def full(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        check_reads_on(full, "bert")


def test_a_stopped_run_saves_only_what_it_can_go_on_from(run):
    run, scorer = run
    broken = torch.nn.Linear(2, 2)
    broken.weight.data[0, 0] = float("nan")
    for weights, sums, saves in ((scorer, False, False), (broken, True, False), (scorer, True, True)):
        run.state = {"scorer": weights, "metrics": sums_of(sums)}
        with pytest.raises(KeyboardInterrupt) as stopped:
            run.keep_within_epoch(Epoch(run, 0, 8), None)  # Whose validation a stop has cut short.
        assert run.path(".state").exists() == saves
        assert ("--resume" in str(stopped.value)) == saves
    assert read_state(run.path(".state"))["parts"]["step"] == 8


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


DAMAGE = {
    "total_len is not a whole number above 0": [{"total_len": "64"}, {"total_len": 30.5}, {"total_len": -5}],
    "max_len is not": [{"max_len": [3]}],
    "weights is not an object": [{"weights": [1]}],
    "weights has no agreement": [{"weights": {"likelihood": 1.0, "power": 1.0}}],
    "weights has no power": [{"weights": {"likelihood": 1.0, "agreement": 1.0}}],
    "weights.agreement is not a number": [
        {"weights": {"likelihood": 1.0, "power": 1.0, "agreement": each}} for each in ("1", float("nan"))
    ],
    "samples is not an object": [{"samples": "x"}],
    "samples.candidates is not an object": [{"samples": {"candidates": [1]}}],
    "validation is not an object": [{"validation": [1]}],
    "earlier_samples is not a list": [{"earlier_samples": "x"}],
    "rouge_tokens is not text": [{"rouge_tokens": ["x"]}],
    "config is not an object": [{"config": "x"}],
    "encoder is not text": [{"encoder": None}],
}


@pytest.fixture
def saved(encoders, tmp_path):
    """The path of a scorer's weights, with its description beside it."""
    scorer, _, description = load_scorer(encoders["bert"], total_len=60, max_len=20)
    save_scorer(tmp_path / "scorer.bin", scorer, description)
    return tmp_path / "scorer.bin"


def describe(path, **changes):
    """Change the description of the weights `path`."""
    described = path.with_name("scorer.json")
    described.write_text(json.dumps(json.loads(described.read_text()) | changes))


@pytest.mark.parametrize("wrong", DAMAGE)
def test_a_damaged_description_is_refused(wrong, saved):
    for changes in DAMAGE[wrong]:
        describe(saved, **{"encoder": "x"} | changes)
        with pytest.raises(UserError, match=r"scorer\.json does not describe a scorer \(" + wrong):
            load_scorer(weights=saved)
        saved.with_name("scorer.json").write_text("{}")


def test_what_a_description_lacks_or_has_as_null_is_unknown(saved):
    describe(saved, earlier_samples=None, samples=None, validation=None, weights=None, config=None, total_len=None)
    assert load_scorer(weights=saved)[1].max_len == 20
    assert read_description(saved).get("earlier_samples", ()) == ()


def test_a_length_that_the_description_sets_is_not_called_an_argument(saved):
    describe(saved, total_len=65)
    with pytest.raises(UserError, match="its total_len of 65 is more than the 64 positions"):
        load_scorer(weights=saved)


def test_an_encoder_that_computes_otherwise_is_another(encoders, saved, tmp_path):
    shutil.copytree(encoders["bert"], tmp_path / "bert")
    config = json.loads((tmp_path / "bert/config.json").read_text())
    unused = {"hidden_dropout_prob": 0.7, "architectures": ["Another"], "dtype": "float16"}
    for changes in ({}, unused):
        (tmp_path / "bert/config.json").write_text(json.dumps(config | changes))
        load_scorer(tmp_path / "bert", saved)
    for name, value in {"hidden_act": "relu", "num_attention_heads": 4}.items():
        (tmp_path / "bert/config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(
            UserError, match=rf"config.json of .*bert has {name} {value} \(in training {config[name]}\)"
        ):
            load_scorer(tmp_path / "bert", saved)
    describe(saved, config=None)  # As from before it was kept.
    load_scorer(tmp_path / "bert", saved)


def test_an_encoder_that_saves_memory_by_chunks_gives_the_same_scores(encoders, tmp_path, sample_folder):
    shutil.copytree(encoders["bert"], tmp_path / "bert")
    config = json.loads((tmp_path / "bert/config.json").read_text())
    (tmp_path / "bert/config.json").write_text(json.dumps(config | {"chunk_size_feed_forward": 2}))
    samples = [read_sample(path) for path in sample_files(sample_folder / "test")][:3]
    scores = []
    for folder in (encoders["bert"], tmp_path / "bert"):
        scorer, encoding, _ = load_scorer(folder, total_len=60, max_len=20)
        scores.append(score_candidates(scorer, encoding, samples, 3, CPU, choose_precision(None, CPU)))
    assert np.array_equal(np.stack(scores[0]), np.stack(scores[1]))


def test_an_encoder_that_fails_is_told_as_what_it_is():
    def broken(**inputs):
        raise ValueError("the tensor dimension to be chunked must divide")

    with pytest.raises(UserError, match=r"'bert' cannot encode a text \(the tensor dimension to be chunked must"):
        check_reads_on(broken, "bert")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value, saved, sample_folder):
    scorer, _, description = load_scorer(weights=saved)
    torch.nn.init.constant_(scorer.encoder.encoder.layer[1].output.LayerNorm.weight, value)
    save_scorer(saved, scorer, description)
    scorer, encoding, _ = load_scorer(weights=saved)
    samples = [read_sample(path) for path in sample_files(sample_folder / "test")][:3]
    with pytest.raises(UserError, match=r"the scorer .*/scorer\.bin gives scores that are NaN or infinite"):
        score_candidates(scorer, encoding, samples, 3, CPU, choose_precision(None, CPU))
