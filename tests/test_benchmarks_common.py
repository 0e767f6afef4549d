"""What the benchmarks share: fair turns, verdicts on targets, and processes under another interpreter."""

import sys
import time

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import common

from harness.endings import UserError

CPU = torch.device("cpu")


def test_arms_take_turns_and_the_order_alternates():
    calls = []
    seconds = common.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abccbaabc"
    assert [len(each) for each in seconds.values()] == [3, 3, 3]


def test_an_arm_may_say_how_long_what_counts_of_it_took():
    def timed_by_itself():
        time.sleep(0.02)
        return 0.5

    def timed_by_us():
        time.sleep(0.02)
        return ["something", "else"]

    seconds = common.interleaved({"own": timed_by_itself, "ours": timed_by_us}, rounds=2)
    assert seconds["own"] == [0.5, 0.5]
    assert min(seconds["ours"]) >= 0.02


TARGETS = {"cpu": {"gain": ("at least", 2.0), "cost": ("at most", 1.01)}, "cuda": {"gain": ("at least", 9.0)}}


@pytest.mark.parametrize(
    ("case", "device", "median", "ending"),
    [
        ("gain", "cpu", 2.0, "; target at least 2: reached"),
        ("gain", "cpu", 1.9, "; target at least 2: missed"),
        ("gain", "cuda", 2.0, "; target at least 9: missed"),
        ("cost", "cpu", 1.0, "; target at most 1.01: reached"),
        ("cost", "cpu", 1.02, "; target at most 1.01: missed"),
        ("cost", "cuda", 1.0, ""),
        ("other", "cpu", 1.0, ""),
    ],
)
def test_verdicts(case, device, median, ending):
    assert common.verdict(TARGETS, torch.device(device), case, {"median": median}) == ending


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(lines of Python): the name of such a script among the benchmarks."""
    monkeypatch.setattr(common, "HERE", tmp_path)

    def write(text):
        (tmp_path / "reference.py").write_text(f"import json, sys\n{text}")
        return "reference.py"

    return write


def test_a_reference_answers(script):
    name = script(
        'print(json.dumps({"name": sys.argv[1]}), flush=True)\n'
        "for line in sys.stdin: print(json.dumps(2 * json.loads(line)), flush=True)\n"
    )
    with common.Reference(sys.executable, name, 7, needs="nothing") as reference:
        assert reference.name == "7"
        assert reference.ask([1, "two"]) == [1, "two", 1, "two"]
    assert reference._process.returncode == 0


def test_a_reference_that_cannot_run_is_one_line(script):
    for python, text in (("/no/such/python", ""), (sys.executable, "import no_such_package")):
        with pytest.raises(UserError, match="it needs compare-mt") as error:
            common.Reference(python, script(text), needs="compare-mt")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["input()", "sys.exit()"], ids=["when it is asked", "before"])
def test_a_reference_that_ends_without_an_answer_is_one_line(script, ending):
    name = script(f'print(json.dumps({{"name": "x"}}), flush=True); {ending}')
    with common.Reference(sys.executable, name, needs="compare-mt") as reference:
        if ending == "sys.exit()":
            reference._process.wait()
        with pytest.raises(UserError, match="it needs compare-mt"):
            reference.ask(1)
