"""What the benchmarks share: fair turns, verdicts on targets, and processes under another interpreter."""

import itertools
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import common

from harness.endings import UserError
from reporting import verdicts


def test_arms_take_turns_and_the_order_alternates():
    calls = []
    seconds = common.interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abccbaabc"
    assert [len(each) for each in seconds.values()] == [3, 3, 3]


def test_an_arm_may_say_how_long_what_counts_of_it_took(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(clock)))
    arms = {"own": lambda: 0.5, "ours": lambda: ["something", "else"]}
    assert common.interleaved(arms, rounds=2) == {"own": [0.5, 0.5], "ours": [1.0, 1.0]}


TARGETS = {
    "cpu": {"gain": ("at least", 2.0), "cost": ("at most", 1.01)},
    "cpu, bfloat16": {"gain": ("at least", 3.0)},
    "cuda": {"gain": ("at least", 9.0)},
}
WITH, WITHOUT = "AMD EPYC, 2 cores, AVX-512, bfloat16", "AMD EPYC, 2 cores, AVX2"


@pytest.mark.parametrize(
    ("case", "device", "hardware", "interval", "verdict"),
    [
        ("gain", "cpu", WITHOUT, [2.0, 2.5], ("at least", 2.0, "yes")),
        ("gain", "cpu", WITHOUT, [1.9, 2.9], ("at least", 2.0, "undecided")),
        ("gain", "cpu", WITHOUT, [1.8, 1.9], ("at least", 2.0, "no")),
        ("gain", "cpu", WITHOUT, None, ("at least", 2.0, "undecided")),
        ("gain", "cpu", WITH, [2.1, 2.9], ("at least", 3.0, "no")),
        ("gain", "cuda", "NVIDIA H100", [2.0, 2.5], ("at least", 9.0, "no")),
        ("cost", "cpu", WITH, [0.9, 1.01], ("at most", 1.01, "yes")),
        ("cost", "cpu", WITHOUT, [1.0, 1.02], ("at most", 1.01, "undecided")),
        ("cost", "cpu", WITHOUT, [1.02, 1.03], ("at most", 1.01, "no")),
        ("cost", "cuda", "NVIDIA H100", [1.0, 1.0], None),
        ("other", "cpu", WITHOUT, [1.0, 1.0], None),
    ],
)
def test_verdicts_are_by_the_interval_and_the_kind_of_processor(case, device, hardware, interval, verdict):
    target = verdicts.find_target(TARGETS, device, hardware, case)
    assert target == verdict[:2] if verdict else target is None
    assert not verdict or verdicts.judge(*target, interval) == verdict[2]


@pytest.mark.parametrize(("n", "held"), [(6, 0.969), (9, 0.961), (100, 0.965)])
def test_the_interval_holds_the_median_in_95_of_100_cases(n, held):
    """What it holds is known exactly: 1 - 2 P(k heads at most), with the most k of which that is 95 % at least."""
    random = np.random.default_rng(0)
    intervals = [common.median_interval(random.lognormal(0.0, 0.3, n)) for _ in range(4000)]
    assert np.mean([low <= 1.0 <= high for low, high in intervals]) == pytest.approx(held, abs=0.01)


def test_few_rounds_have_no_interval():
    assert common.median_interval([1.0] * 5) is None
    few, enough = (common.ratio_summary([2.0, 3.0] * n, [1.0] * 2 * n) for n in (2, 3))
    assert (few["interval"], enough["interval"]) == (None, [2.0, 3.0])


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


def test_a_script_of_this_interpreter_that_ends_is_named(script):
    with pytest.raises(UserError, match=r"reference\.py --side kept ended without an answer"):
        common.Reference(sys.executable, script("sys.exit()"), "--side", "kept")


@pytest.mark.parametrize("ending", ["input()", "sys.exit()"], ids=["when it is asked", "before"])
def test_a_reference_that_ends_without_an_answer_is_one_line(script, ending):
    name = script(f'print(json.dumps({{"name": "x"}}), flush=True); {ending}')
    with common.Reference(sys.executable, name, needs="compare-mt") as reference:
        if ending == "sys.exit()":
            reference._process.wait()
        with pytest.raises(UserError, match="it needs compare-mt"):
            reference.ask(1)
