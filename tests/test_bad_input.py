"""Bad input to every script: exit code 2, one line on stderr that says what is wrong, nothing written.

The table is in bad_inputs.py. A picture, pickle or model that is hostile leaves the file `the-pickle-ran`.
"""

import json

import bad_files
import bad_inputs
import launch
import pytest
import tiny_inputs
import torch
from model import load_scorer, save_scorer

STATE = "model_history/resnext_0_worker_8_resnext29_1x4d_folder.state"
CASES = [(script, *case) for script, cases in bad_inputs.TABLE.items() for case in cases]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pictures, encoders):
    """(good, bad): the folders that the table names."""
    folder = tmp_path_factory.mktemp("inputs")
    good, bad = folder / "good", folder / "bad"
    good.mkdir()
    bad.mkdir()
    for name, path in {"pictures": pictures, "t5": encoders["t5"], "bert": encoders["bert"]}.items():
        (good / name).symlink_to(path)
    # Not a link: token ids are kept beside the samples.
    tiny_inputs.make_samples(good / "samples")
    tiny_inputs.make_table(good / "papers.csv")
    tiny_inputs.make_candidates(good / "candidates", 60, 3)
    scorer, _, description = load_scorer(good / "t5", total_len=60, max_len=20)
    (good / "scorer").mkdir()
    save_scorer(good / "scorer/scorer.bin", scorer, description)
    bad_files.make_bad_files(good, bad)
    return good, bad


@pytest.fixture
def place(tmp_path, folders):
    """A current folder with a file, a folder, a model, and scorers in it."""
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/one.txt").write_text("one\n")
    (tmp_path / "mine/two.txt").write_text("one\ntwo\n")
    (tmp_path / "mine/README.md").write_text("<!-- report:runs -->\n")
    bad_files.make_weights(folders[0], tmp_path / "cache")
    return tmp_path


def contents(folder):
    """Every file below `folder` but empty locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(script, arguments, place, folders, **more):
    """The one line of a script that ends with exit code 2 and has written nothing."""
    good, bad = folders
    before = contents(place)
    arguments = f"{bad_inputs.GOOD[script]} {arguments}".format(good=good, bad=bad).split()
    ended = launch.run(script, *arguments, cwd=place, **more)
    assert ended.code == 2, ended.err
    # report.py tells of files that it leaves out of a folder, whatever comes then.
    lines = [
        line for line in ended.err.splitlines() if not line.startswith(("report.py: skipped", "report.py: no runs"))
    ]
    assert "--phases" not in arguments or lines == ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert contents(place) == before
    return lines[0]


def test_the_table_is_long_and_has_every_script():
    assert len(CASES) == len(set(CASES)) >= 60
    found = [path for folder in ("resnext", "SimCLS") for path in (launch.ROOT / folder).rglob("*.py")]
    scripts = {str(path.relative_to(launch.ROOT)) for path in found if "endings.run(main)" in path.read_text()}
    assert scripts | {"report.py"} == bad_inputs.TABLE.keys()


@pytest.mark.parametrize(("script", "arguments", "line"), CASES, ids=[f"{each[0]} {each[1]}" for each in CASES])
def test_one_line(script, arguments, line, place, folders):
    good, bad = folders
    assert line.format(good=good, bad=bad) in refused(script, arguments, place, folders)


# ------------------------------------------------------------------------------------- what takes more to bring about

WITHOUT_NETWORK = """
import torchvision.datasets
def offline(*args, **kwargs):
    raise ConnectionError("no route to host")
torchvision.datasets.CIFAR10.__init__ = offline
"""
ONE_GPU = "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1"


def test_no_cifar10_and_no_network(place, folders):
    line = refused("resnext/resnext.py", "--dataset cifar10", place, folders, before=WITHOUT_NETWORK)
    assert "--dataset digits" in line
    assert "--data_dir" in line


def test_a_gpu_that_is_not_there(place, folders):
    assert "--cuda: PyTorch finds no CUDA GPU" in refused("SimCLS/main.py", "--cuda", place, folders)
    line = refused("SimCLS/main.py", "--cuda --gpuid 5", place, folders, before=ONE_GPU)
    assert "--gpuid 5: there is no such GPU; this machine has 1" in line


def test_an_interrupted_run_is_not_overwritten(place, folders):
    state = place / "tuned/checkpoints/checkpoint-6"
    state.mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (state / name).write_text("{}")
    line = refused("SimCLS/finetune_model.py", "", place, folders)
    assert "holds an interrupted run; --resume continues it, --restart starts over" in line
    (state.parent / "arguments.json").write_text(json.dumps({"lr": 5}))
    assert "--lr 5 (now 0.0003)" in refused("SimCLS/finetune_model.py", "--resume", place, folders)


@pytest.mark.parametrize("state", ["checkpoint-7", "checkpoint-best"])
def test_checkpoints_of_another_program_stay(state, place, folders):
    (place / "tuned/checkpoints" / state).mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors"):
        (place / "tuned/checkpoints" / state / name).write_text("{}")
    for more in ("", "--resume"):
        line = refused("SimCLS/finetune_model.py", more, place, folders)
        assert "checkpoints contains files that this script did not write; choose another --save_dir" in line
    (place / "tuned/checkpoints/arguments.json").write_text("{}")
    (place / "tuned/config.json").write_text("{}")  # Ours, in a run that is refused all the same.
    assert "tuned already contains a model" in refused("SimCLS/finetune_model.py", "", place, folders)


def test_a_model_beside_a_torn_record_is_not_replaced(place, folders):
    (place / "model/brio.json").write_text("{")
    said = refused("SimCLS/brio.py", "--save_dir model", place, folders)
    assert "brio.json already exists, and no record says" in said


def whole_state(**changes):
    """What a state file holds, of a run with other arguments unless `changes` say more."""
    return {"format": 1, "arguments": {"lr": 5.0}, "random": {"cpu": 0, "cuda": []}, "parts": {}} | changes


STATES = {
    "foreign": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "without parts": lambda path: torch.save({"format": 1}, path),
    "hostile": lambda path: torch.save(whole_state(arguments=bad_files.Mark()), path),
    "cut": lambda path: (torch.save(whole_state(), path), path.write_bytes(path.read_bytes()[:-500])),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no state at all"),
    "a pickle's stop": lambda path: path.write_text(".rubbish"),
    "a pickle's number": lambda path: path.write_text("Krubbish"),
}


@pytest.mark.parametrize("content", STATES)
def test_resume_from_what_is_no_state(content, place, folders):
    path = place / STATE
    path.parent.mkdir()
    STATES[content](path)
    line = refused("resnext/resnext.py", "--resume", place, folders)
    assert f"{STATE} is not a complete training state of this program; delete it" in line


def test_resume_with_other_arguments(place, folders):
    (place / STATE).parent.mkdir()
    torch.save(whole_state(), place / STATE)
    assert "--lr 5.0 (now 0.01)" in refused("resnext/resnext.py", "--resume", place, folders)


def test_resume_from_a_state_whose_parts_are_wrong(place, folders):
    (place / STATE).parent.mkdir()
    good, bad = folders
    arguments = bad_inputs.GOOD["resnext/resnext.py"].format(good=good, bad=bad).split()
    # A run at a constant rate leaves a state to go on from.
    assert launch.run("resnext/resnext.py", *arguments, cwd=place).code == 0
    state = torch.load(place / STATE, weights_only=True)
    for part in ("model", "history"):
        torch.save(
            state | {"parts": {name: value for name, value in state["parts"].items() if name != part}}, place / STATE
        )
        line = refused("resnext/resnext.py", "--resume --num_epoch 2", place, folders)
        assert "is not a complete training state" in line


def test_resume_from_a_folder(place, folders):
    (place / STATE).mkdir(parents=True)
    assert "cannot read the saved state" in refused("resnext/resnext.py", "--resume", place, folders)


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a/../../b"])
def test_a_generators_name_stays_inside_candidates(name, place, folders):
    (place / "work/deep").mkdir(parents=True)
    before = contents(place)
    ended = launch.run("SimCLS/gen_candidate.py", "--generator_name", name, "--dataset_name",
                       folders[0] / "papers.csv", cwd=place / "work/deep")  # fmt: skip
    assert ended.code == 2
    assert contents(place) == before
