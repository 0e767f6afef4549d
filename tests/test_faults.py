"""The short form of the fault trials: each fault at least once, on one or two scripts. tests/faults.py has them all."""

import fault_kinds
import pytest
from fault_kinds import KILLS, OTHERS, WITH_WORKERS, Lost, Unavailable
from faults import Trials, get_args_parser, plan, table

pytestmark = pytest.mark.slow

FAULTS = KILLS | OTHERS | WITH_WORKERS
# Which scripts; a fault has its turn with each in the full form.
SHORT = {
    "SIGKILL at a random moment": ["resnext_checkpoint.py", "resnext_fast.py", "finetune_model.py", "main.py"],
    "SIGKILL while files change": ["resnext.py", "finetune_model.py", "gen_candidate.py", "preprocess.py", "main.py"],
    "SIGINT, SIGTERM or SIGHUP": ["resnext.py", "finetune_model.py", "gen_candidate.py", "main.py"],
    "full disk": ["resnext.py", "finetune_model.py", "gen_candidate.py", "main.py"],
    "read-only disk": ["main.py", "gen_candidate.py"],
    "GPU out of memory": ["resnext_checkpoint.py", "finetune_model.py", "main.py"],
    "second run, same output": ["finetune_model.py"],
    "killed worker": ["resnext.py", "main.py"],
    "SIGKILL with workers": ["resnext.py"],
}


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return Trials(tmp_path_factory.mktemp("trials"))


@pytest.mark.parametrize(("fault", "script"), [(fault, script) for fault in SHORT for script in SHORT[fault]])
def test_nothing_is_lost(trials, fault, script):
    (experiment,) = [each for each in trials.experiments if each.name == script]
    lost = trials.run(fault, FAULTS[fault], experiment)
    if lost.startswith("not tried"):
        pytest.skip(lost)
    assert lost == "nothing"


def test_what_is_lost_is_told(tmp_path):
    trials = Trials(tmp_path, ["preprocess"])

    def loses(trial):
        trial.start().wait()
        (trial.folder / "samples/0.json").write_text("{}")
        (trial.folder / "samples/1.json").unlink()
        trial.compare(fault_kinds.snapshot(trial.folder))

    def unavailable(trial):
        raise Unavailable("no root")

    assert trials.run("a loss", loses, trials.experiments[0]) == "files are missing: ['samples/1.json']"
    assert trials.run("no chance", unavailable, trials.experiments[0]) == "not tried: no root"
    assert trials.rows["a loss", "preprocess.py"] == {
        "tried": 1, "survived": 0, "lost": "files are missing: ['samples/1.json']"}  # fmt: skip
    rows = [{"fault": fault, "script": script, **row} for (fault, script), row in trials.rows.items()]
    assert table(rows).splitlines()[-1] == "| all | | 1 | 0 | |"
    with pytest.raises(Lost, match="exit code 0"):
        fault_kinds.said_in_one_line(trials_script(trials), 2, "anything")


def trials_script(trials):
    import launch

    return launch.run("SimCLS/preprocess.py", "--help", cwd=trials.folder)


def test_every_fault_is_planned_for_every_script_that_can_meet_it(trials):
    args = get_args_parser().parse_args(["--trials", "50"])
    planned = plan(args, trials.experiments)
    assert sum(fault.startswith("SIGKILL") and fault in KILLS for fault, _, _ in planned) == 50
    assert {fault for fault, _, _ in planned} == FAULTS.keys() | fault_kinds.MANY_PROCESSES.keys()
    for fault in (*KILLS, "full disk", "SIGINT, SIGTERM or SIGHUP"):
        assert {each.name for name, _, each in planned if name == fault} == {each.name for each in trials.experiments}
