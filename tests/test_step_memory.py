"""benchmarks/step_memory.py: each byte of a step is of the right kind at the right time; and its figure."""

import json

import pytest
from PIL import Image

from reporting import benchmarks
from reporting.figures import draw_all


@pytest.fixture(scope="module")
def folder(run_script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    path = folder / "cpu" / "step_memory.json"
    run_script("benchmarks/step_memory.py", "--model", "resnext29_2x8d", "--batch_size", 4, "--output", path)
    return folder


def test_what_is_kept_passes_or_is_redone(folder):
    record = json.loads((folder / "cpu" / "step_memory.json").read_text())
    kinds = record["kinds"]
    most, ends = {}, {}
    for name, step in record["steps"].items():
        before = [point for point in step["points"] if point[0] < step["backward_begins"]]
        after = [point for point in step["points"] if point[0] >= step["backward_begins"]]
        most[name] = {kind: max(point[1 + index] for point in after) for index, kind in enumerate(kinds)}
        assert not any(point[3] or point[4] or point[5] for point in before)  # What backward alone makes.
        assert before[-1][1] == pytest.approx(step["held_bytes"], rel=0.1)
        assert all(min(point) >= 0 for point in step["points"])
        ends[name] = step["points"][-1][1]
    assert list(most) == ["plain", "chain", "block", "budget 0.5"]
    assert most["plain"]["redone"] == 0
    assert all(most[name]["redone"] > 0 for name in ("chain", "block", "budget 0.5"))
    held = {name: step["held_bytes"] for name, step in record["steps"].items()}
    assert held["block"] < held["chain"] < held["plain"]
    # By the end what was kept is freed, and every weight has a gradient.
    assert all(left < 0.2 * held[name] for name, left in ends.items())
    assert most["plain"]["gradients of weights"] >= 0.9 * record["weight_bytes"]


def test_the_figure(folder, tmp_path):
    (path,) = draw_all([], benchmarks.read(folder), tmp_path)
    assert Image.open(path).width == 1000
    record = json.loads((folder / "cpu" / "step_memory.json").read_text()) | {"kinds": 3}
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "step_memory.json").write_text(json.dumps(record))
    assert draw_all([], benchmarks.read(tmp_path), tmp_path) == []
