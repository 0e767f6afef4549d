"""The same command gives the same bits on a CPU, and --deterministic asks for them on CUDA.

For the scripts that work for long, tests/test_faults.py compares runs that were interrupted; the others are here.
"""

import json

import launch
import pytest
import tiny_inputs
import torch
from experiments import snapshot
from model import load_scorer, save_scorer

# Tells, when the script has ended, what --deterministic has switched on.
TELL = """
import atexit, os
def tell():
    import torch
    state = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    print("told", *state, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
atexit.register(tell)
"""


@pytest.mark.parametrize("arch", ["t5", "bert"])
def test_a_new_model_is_the_same_each_time(arch, tmp_path):
    tiny_inputs.make_table(tmp_path / "papers.csv")
    size = ["--vocab_size", 320, "--d_model", 32, "--d_ff", 32, "--num_heads", 2, "--num_layers", 1]
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        made = launch.run("SimCLS/create_model.py", "--arch", arch, "--data_file", "papers.csv", *size,
                          "--save_dir", name, "--seed", seed, cwd=tmp_path)  # fmt: skip
        assert made.code == 0, made.err
    one, two, other = (snapshot(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]


def test_an_evaluation_is_the_same_each_time(encoders, sample_folder, tmp_path):
    scorer, _, description = load_scorer(encoders["bert"], total_len=30, max_len=10)
    save_scorer(tmp_path / "scorer.bin", scorer, description)
    records = []
    for name in ("one.json", "two.json"):
        ended = launch.run("SimCLS/evaluate_model.py", "--samples", sample_folder / "test", "--scorer_path",
                           "scorer.bin", "--output", name, cwd=tmp_path)  # fmt: skip
        assert ended.code == 0, ended.err
        records.append(json.loads((tmp_path / name).read_text())["systems"])
    assert records[0] == records[1]


@pytest.mark.parametrize("flag", [[], ["--deterministic"], ["--deterministic", "False"]], ids=" ".join)
def test_deterministic_algorithms_where_they_are_asked_for(flag, encoders, sample_folder, pictures, tmp_path):
    table = tiny_inputs.make_table(tmp_path / "papers.csv")
    image = ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 8,
             "--num_worker", 0, "--max_steps", 2]  # fmt: skip
    scripts = {
        "resnext/resnext.py": image,
        "resnext/resnext_checkpoint.py": image,
        "resnext/resnext_fast.py": image,
        "SimCLS/main.py": ["--dataset", sample_folder, "--model_type", encoders["t5"], "--num_workers", 0,
                           "--max_steps", 2],
        "SimCLS/finetune_model.py": ["--pt_model", encoders["t5"], "--data_file", table, "--save_dir", "tuned",
                                     "--max_steps", 2, "--max_source_length", 24, "--max_target_length", 8],
    }  # fmt: skip
    wanted = flag == ["--deterministic"]
    for script, arguments in scripts.items():
        ended = launch.run(script, *arguments, *flag, cwd=tmp_path, before=TELL)
        assert ended.code == 0, ended.err
        on, races, workspace = ended.out.splitlines()[-1].split()[1:]
        assert on == str(wanted), script
        assert workspace == (":4096:8" if wanted else "None"), script
        assert races == str(script.endswith("fast.py") and not wanted), script
    records = [path for path in tmp_path.rglob("*.json") if "steps" in path.name or path.name == "finetune.json"]
    assert len(records) == len(scripts)
    for path in records:
        assert json.loads(path.read_text())["arguments"]["deterministic"] == wanted
        assert ("deterministic" in path.name) == (wanted and path.name != "finetune.json")


def test_deterministic_training_is_that_without_it_on_a_cpu(pictures, tmp_path):
    image = ["--dataset", "folder", "--data_dir", pictures, "--model", "resnext29_1x4d", "--batch_size", 8,
             "--num_worker", 0, "--num_epoch", 1, "--lr", 0.002]  # fmt: skip
    weights = []
    for flag, name in (([], ""), (["--deterministic"], "_deterministic")):
        ended = launch.run("resnext/resnext.py", *image, *flag, cwd=tmp_path)
        assert ended.code == 0, ended.err
        weights.append(torch.load(tmp_path / f"model_history/resnext_0_worker_8_resnext29_1x4d_folder{name}.pt"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
