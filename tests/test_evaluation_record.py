"""What an evaluation's record was made of: it replaces none of something else, nor one that is being made."""

import argparse
import json
import shutil

import evaluate_model
import launch
import pytest
from model import load_scorer, save_scorer

from harness.endings import UserError
from harness.files import output_lock
from scorer import evaluation_record


@pytest.fixture
def place(encoders, tmp_path):
    """A folder with a scorer, its encoder and a generator."""
    for kind in ("t5", "bert"):
        shutil.copytree(encoders[kind], tmp_path / kind)
    scorer, _, description = load_scorer(tmp_path / "bert", total_len=60, max_len=20)
    save_scorer(tmp_path / "scorer.bin", scorer, description)
    return tmp_path


def test_an_input_is_known_by_its_documents_and_its_generator(encoders, tmp_path):
    shutil.copytree(encoders["t5"], tmp_path / "t5")
    (tmp_path / "papers.csv").write_text("abstract,title\n")
    words = ["--generator_name", str(tmp_path / "t5"), "--dataset_name", str(tmp_path / "papers.csv")]
    args, found = evaluate_model.get_args_parser().parse_args(words), set()
    for path, text in (("papers.csv", "a,b\n"), ("t5/generation_config.json", '{"decoder_start_token_id": 0}')):
        found |= {evaluation_record.digest_of_input(args), evaluation_record.digest_of_input(args)}
        (tmp_path / path).write_text(text)
    assert len(found | {evaluation_record.digest_of_input(args)}) == 3


def test_the_models_are_known_by_all_their_files(place):
    args = argparse.Namespace(generator_name=str(place / "t5"), scorer_path=place / "scorer.bin")

    def digest():
        return evaluation_record.digest_of_models(args, str(place / "bert"))

    found = {digest(), digest()}
    changed = ("scorer.json", "bert/config.json", "bert/model.safetensors", "t5/vocab.txt", "t5/source.spm")
    for name in (*changed, "t5/prophetnet.tokenizer"):
        with open(place / name, "a") as file:
            file.write(" ")
        found.add(digest())
    assert len(found) == 7
    (place / "t5/README.md").write_text("Of no consequence.")
    assert digest() in found


def test_a_record_of_other_models_is_not_replaced_unless_it_does_not_tell(tmp_path):
    used = dict.fromkeys(evaluation_record.USED, "as it was")
    record = {"experiment": evaluation_record.EXPERIMENT, "arguments": {"seed": 0}}
    (tmp_path / "new.json").write_text(json.dumps(record | used))
    older = {name: each for name, each in used.items() if name != "models_digest"}
    (tmp_path / "older.json").write_text(json.dumps(record | older))
    evaluation_record.refuse_to_replace(tmp_path / "older.json", {"seed": 0}, used)
    evaluation_record.refuse_to_replace(tmp_path / "new.json", {"seed": 0}, used)
    with pytest.raises(UserError, match="is from an evaluation with another scorer.json, encoder, or tokenizer"):
        evaluation_record.refuse_to_replace(tmp_path / "new.json", {"seed": 0}, used | {"models_digest": "other"})


def test_two_evaluations_do_not_write_one_record(place, sample_folder):
    words = ["--samples", sample_folder / "test", "--scorer_path", "scorer.bin", "--output", "out.json"]
    with output_lock(place / "out.json.lock"):
        ended = launch.run("SimCLS/evaluate_model.py", *words, cwd=place)
    assert ended.code == 2, ended.err
    assert "another run is writing out.json; wait for it to end, or choose another output" in ended.err
    ended = launch.run("SimCLS/evaluate_model.py", *words, cwd=place)
    assert ended.code == 0, ended.err
    (place / "scorer.json").write_text((place / "scorer.json").read_text() + " ")
    ended = launch.run("SimCLS/evaluate_model.py", *words, cwd=place)
    assert "out.json already exists and is from an evaluation with another scorer.json" in ended.err
