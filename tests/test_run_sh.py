"""run.sh: its jobs, the commands that they print, and what is not done twice."""

import argparse
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scorer.scorer_arguments import get_args_parser, run_name

sys.path.append(str(ROOT / "benchmarks"))


def run_job(*words, code=0, folder=ROOT, cwd=None, **environment):
    """`bash run.sh WORDS` of `folder`, given in the folder `cwd`: its lines on stdout, or on stderr when it is to
    fail."""
    command = [shutil.which("bash"), str(folder / "run.sh"), *words]
    environment = os.environ | environment
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd=cwd or folder)
    assert result.returncode == code, result.stderr
    return (result.stderr if code else result.stdout).splitlines()


def test_an_unknown_job_is_one_line():
    (line,) = run_job("nonsense", code=2)
    assert "nonsense" in line
    assert "simcls" in line


def test_a_text_that_is_not_named_is_one_line():
    (line,) = run_job("pubmed", code=2, DRY="1", CSV="")
    assert "CSV=" in line


@pytest.mark.parametrize(
    ("job", "variable"),
    [("", "EPOCHS"), ("cifar", "MODEL"), ("resnext", "SEEDS"), ("simcls", "PERCENT"), ("pubmed", "CSV"),
     ("profile", "STEPS"), ("benchmarks", "ONLY"), ("lint", "DRY")],
)  # fmt: skip
def test_arguments_that_would_be_ignored_are_one_line(job, variable):
    (line,) = run_job(job, "--num_epoch", "3", code=2, DRY="1")
    assert "'--num_epoch 3' would be ignored" in line
    assert variable in line


def test_paths_are_relative_to_the_folder_of_the_caller(tmp_path):
    there = {"DRY": "1", "PICTURES": "my pictures", "CSV": "a.csv", "OUT": "out", "ONLY": "fast"}
    for job, path, where in (("cifar", "my pictures", "--data_dir"), ("pubmed", "a.csv", "--dataset_name"),
                             ("benchmarks", "out/fast.json", "--output")):  # fmt: skip
        words = [word for line in run_job(job, cwd=tmp_path, **there) for word in shlex.split(line)]
        assert words[words.index(where) + 1] == str(tmp_path / path)
        absolute = run_job(job, cwd=tmp_path, **there | {"PICTURES": "/p", "CSV": "/p", "OUT": "/p"})
        words = [word for line in absolute for word in shlex.split(line)]
        assert words[words.index(where) + 1].startswith("/p")
    assert run_job("report", "mine", cwd=tmp_path, DRY="1") == [f"$ cd {tmp_path}", f"$ python3 {ROOT}/report.py mine"]
    assert run_job("report", "mine", DRY="1") == ["$ python3 report.py mine"]


class Parsed(Exception):
    """The arguments of a script are right."""


@pytest.fixture
def check_arguments(monkeypatch):
    """check_arguments(script, words): parse them as the script does, which exits when they are wrong."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser):
        parse_args(parser)
        raise Parsed

    def check(script, words):
        monkeypatch.setattr("sys.argv", [script, *words])
        parts = Path(script).with_suffix("").parts
        parts = parts[parts.index("SimCLS") + 1 :] if "SimCLS" in parts else parts[-1:]  # In a room below, too.
        with pytest.raises(Parsed):
            importlib.import_module(".".join(parts)).main()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    return check


@pytest.mark.parametrize("job", ["", "cifar", "resnext", "simcls", "pubmed", "profile", "benchmarks", "report"])
def test_every_command_has_arguments_that_its_script_takes(job, check_arguments):
    lines = run_job(*job.split(), DRY="1", CSV="my abstracts.csv", PICTURES="my pictures")
    commands = [shlex.split(line[2:]) for line in lines if line.startswith("$ ")]
    assert commands
    for words in commands:
        scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
        for place in scripts:
            assert (ROOT / words[place].replace("../", "")).is_file()
            check_arguments(words[place], words[place + 1 :])


def test_the_scorer_has_seven_set_ups():
    """Each trained to its end, and then once more for an epoch, for its time."""
    trained = [line for line in run_job("simcls", DRY="1", EPOCHS="3", SEEDS="0 1") if "/main.py" in line]
    assert len(trained) == len(set(trained)) == 28
    assert sum("--seed 1" in line for line in trained) == 14
    assert ["--num_epoch 3" in line for line in trained] == [True] * 14 + [False] * 14
    assert all("--num_epoch 1" in line for line in trained[14:])


def test_what_is_evaluated_has_been_trained():
    lines = [shlex.split(line) for line in run_job("simcls", DRY="1", SEEDS="0 1")]
    mains = [words[place + 1 :] for words in lines for place, word in enumerate(words) if word.endswith("/main.py")]
    trained = {f"cache/{run_name(get_args_parser('').parse_args(words))}/scorer.bin" for words in mains}
    evaluated = {words[words.index("--scorer_path") + 1] for words in lines if "--scorer_path" in words}
    assert len(evaluated) == 2
    assert evaluated <= trained


@pytest.fixture
def copy_of_run_sh(tmp_path):
    """A folder with run.sh, and an environment in which python writes down its arguments to calls.txt, and no more."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("requirements.txt", "requirements-encoder.txt", ".venv/installed", ".venv/encoder"):
        (tmp_path / name).touch()
    for name in ("python", "python3"):
        (tmp_path / ".venv" / "bin" / name).write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls.txt\n')
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    return tmp_path


def test_what_is_finished_is_not_done_again(copy_of_run_sh):
    finished = copy_of_run_sh / "runs" / "simcls" / "20_percent" / "samples" / "train" / "0.json"
    finished.parent.mkdir(parents=True)
    finished.touch()
    calls = copy_of_run_sh / "calls.txt"
    lines = run_job("simcls", folder=copy_of_run_sh)
    assert "# samples/train/0.json already exists (AGAIN=1 makes it again)" in lines
    made = calls.read_text()
    assert made.count("--split train") == 1  # Of the times.
    assert made.count("--split val") == 2
    assert made.count("main.py") == 14
    assert made.count("--resume") == 15  # brio.py's is the last.
    calls.unlink()
    run_job("simcls", folder=copy_of_run_sh, AGAIN="1")
    made = calls.read_text()
    assert made.count("--split train") == 2
    assert made.count("main.py") == 14
    assert "--resume" not in made


def test_a_failing_run_is_named_and_the_others_go_on(copy_of_run_sh):
    failing = f'#!/bin/sh\necho "$@" >>{copy_of_run_sh}/calls.txt\ncase "$*" in *896*) exit 2 ;; esac\n'
    (copy_of_run_sh / ".venv" / "bin" / "python3").write_text(failing)
    lines = run_job("resnext", folder=copy_of_run_sh, code=2)
    assert len(lines) == 4
    assert all(line.startswith("# failed, exit code 2: resnext/") and "896" in line for line in lines)
    assert "resnext_fast.py" in (copy_of_run_sh / "calls.txt").read_text()


def test_benchmarks_are_run_one_by_one_with_the_python_that_is_there(copy_of_run_sh):
    folder, calls = copy_of_run_sh / ".venv" / "bin", copy_of_run_sh / "calls.txt"
    (copy_of_run_sh / "requirements.txt").write_text("something new")  # Which is not installed.
    failing = f'#!/bin/sh\necho "$@" >>{calls}\ncase "$*" in *layout*) exit 1 ;; esac\n'
    (folder / "python3").write_text(failing)
    environment = {"NO_SETUP": "1", "PATH": f"{folder}:{os.environ['PATH']}", "ONLY": "layout fast", "LIMIT": "60"}
    lines = run_job("benchmarks", folder=copy_of_run_sh, code=1, OUT="there", **environment)
    assert lines == ["# failed, exit code 1: layout"]
    assert calls.read_text().splitlines() == [
        f"benchmarks/{name}.py --output there/{name}.json" for name in ("layout", "fast")
    ]


def test_without_the_pretrained_encoder_the_scorer_starts_from_the_generator_s(copy_of_run_sh):
    (copy_of_run_sh / "requirements-encoder.txt").write_text("what no index has")
    failing = '#!/bin/sh\ncase "$*" in *requirements-encoder*|*minilm.py) exit 1 ;; esac\n'
    for name in ("python", "python3"):
        (copy_of_run_sh / ".venv" / "bin" / name).write_text(failing)
    trained = [line for line in run_job(folder=copy_of_run_sh) if "/main.py" in line]
    assert len(trained) == 1
    assert "--model_type ../../../SimCLS/demo " in trained[0]


def test_an_interrupted_run_ends_the_job(copy_of_run_sh):
    interrupted = f'#!/bin/sh\necho "$@" >>{copy_of_run_sh}/calls.txt\nexit 130\n'
    (copy_of_run_sh / ".venv" / "bin" / "python3").write_text(interrupted)
    assert run_job("resnext", folder=copy_of_run_sh, code=130) == []
    assert len((copy_of_run_sh / "calls.txt").read_text().splitlines()) == 1


@pytest.mark.skipif(not os.sysconf("SC_NPROCESSORS_ONLN") > 1, reason="needs two cores")
def test_the_two_parts_of_the_short_job_run_side_by_side_and_stop_together(copy_of_run_sh):
    calls, python = copy_of_run_sh / "calls.txt", copy_of_run_sh / ".venv" / "bin" / "python3"
    writes = f'#!/bin/sh\necho "$OMP_NUM_THREADS $@" >>{calls}\n'
    # Each part waits for the other's first command.
    meets = "case $* in *sample_data*) other=resnext/ ;; *) other=sample_data ;; esac\n"
    meets += f"until grep -q $other {calls}; do sleep 0.1; done\n"
    python.write_text(writes + meets + "case $* in *preprocess*) exit 1 ;; esac\n")
    how = {"cwd": copy_of_run_sh, "env": os.environ | {"OMP_NUM_THREADS": "7"}, "capture_output": True, "text": True}
    result = subprocess.run(["bash", "run.sh"], **how, timeout=60)
    assert result.returncode == 1  # Of preprocess.py; what stands beside it has gone on.
    lines = calls.read_text().splitlines()
    assert [line for line in lines if line.startswith("1 ")] == [line for line in lines if "SimCLS/" in line]
    assert sum("resnext/" in line for line in lines) == 9
    assert "report.py" in lines[-1]
    commands = [line.split()[2] for line in result.stdout.splitlines() if line.startswith("$ python3")]
    assert [command.split("/")[-1] for command in commands[9:]] == [
        "sample_data.py", "gen_candidate.py", "preprocess.py", "report.py"
    ]  # fmt: skip
    # Interrupted, with the chain in the midst of a command.
    stopped = copy_of_run_sh / "stopped"
    trap = f"trap 'sleep 1; echo >{stopped}; exit 143' TERM"
    case = f"case $* in *sample_data*) ;; *) until grep -q sample_data {calls}; do sleep 0.1; done; exit 130 ;; esac"
    python.write_text(f"#!/bin/sh\n{trap}\necho $@ >>{calls}\n{case}\nwhile :; do sleep 0.1; done\n")
    calls.unlink()
    result = subprocess.run(["bash", "run.sh"], **how, timeout=60)
    assert result.returncode == 130
    assert stopped.exists()


def test_an_old_python_is_one_line(copy_of_run_sh):
    (copy_of_run_sh / "old").write_text("#!/bin/sh\nexit 1\n")
    (copy_of_run_sh / "old").chmod(0o755)
    (line,) = run_job("report", folder=copy_of_run_sh, code=2, PYTHON=str(copy_of_run_sh / "old"))
    assert "older than 3.11" in line
