"""README.md and docs/: what is generated in them, from which records, and that their links and numbers hold."""

import json
import re
import shutil

import pytest
from conftest import ROOT
from run_records import make_record, make_run, read_table

from harness.endings import UserError
from reporting import headline, headline_figures, links, records, sentences, studies, tables
from reporting.pages import NOTEBOOK, rewrite

DIRTY = "0123456789ab-dirty"


def write(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_pages_are_rewritten_between_their_markers_only(run_script, tmp_path):
    half = make_record(0.8, device="cpu", precision="bf16", half_precision="bfloat16")
    write(tmp_path / "runs" / "a.json", make_record(device="cpu", precision="fp32"))
    write(tmp_path / "runs" / "b.json", half)
    write(tmp_path / "runs" / "c.json", half | {"machine": half["machine"] | {"commit": DIRTY}, "precision": "x"})
    write(tmp_path / "runs" / "d.json", half | {"machine": half["machine"] | {"commit": None}, "precision": "y"})
    text = "# Title\n\n<!-- report:mixed-precision -->\nstale\n<!-- /report:mixed-precision -->\n\nBetween.\n"
    text += "\nÄnd <!-- report:simcls --><!-- /report:simcls -->!\r\n"
    page = tmp_path / "docs" / "deep" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text(text + "<!-- report:bullets -->\n<!-- /report:bullets -->", newline="")
    (tmp_path / "README.md").write_text("no marker")
    command = ["report.py", tmp_path / "runs", "--benchmark_dir", tmp_path, "--readme", tmp_path]
    said = run_script(*command).stderr
    assert re.findall(r"refused \S*/(\w\.json)", said) == ["c.json", "d.json"]
    assert "page.md has no records for simcls" in said
    new = page.read_bytes().decode()
    run_script(*command)
    assert page.read_bytes().decode() == new
    assert "stale" not in new
    assert "| bf16 | 1 | 0.80 |" in new
    assert "commit 0123456, 2026-01-01:" in new
    assert "Step, ms" not in read_table(new)[0]  # No time of a CPU.
    assert "](../../docs/techniques/half-precision.md)" in new
    inside = r"(<!-- report:(\S+) -->).*?(<!-- /report:\2 -->)"
    assert re.sub(inside, r"\1\3", new, flags=re.DOTALL).startswith(re.sub(inside, r"\1\3", text, flags=re.DOTALL))
    assert (tmp_path / "image" / "techniques.png").is_file()


def test_this_repositorys_pages_and_figures_are_what_its_records_make(run_script, tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "SimCLS").mkdir()
    shutil.copy(ROOT / NOTEBOOK, tmp_path / NOTEBOOK)
    said = run_script("report.py", "--readme", tmp_path).stderr
    assert "skipped" not in said
    assert "refused" not in said
    for folder, pattern in (("", "README.md"), ("docs", "**/*.md"), ("image", "*.png"), ("SimCLS", "*.ipynb")):
        committed = {path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern)}
        made = {path.relative_to(tmp_path) for path in (tmp_path / folder).glob(pattern)}
        assert committed == made
        for path in committed:
            assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), path


def prose(page):
    """The text of a page that a hand wrote, without code, links and what is no measurement."""
    text = re.sub(r"(<!-- report:(\S+) -->).*?(<!-- /report:\2 -->)", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    return re.sub(r"95 % (bootstrap )?interval|5 % level|LIMIT=\d+", "", text)


MEASURED = re.compile(r"\d\s?(×|%|points|[MG]i?B\b|ms\b|(images|pictures)/s|TFLOP)|\d (times|x) as (fast|slow)")
BY_HAND = ("docs/log.md", "docs/original-study.md", "docs/glossary.md", "docs/techniques/loading.md")


def test_measured_numbers_are_generated():
    """A diary and what others published are written by hand: those figures have no record here."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        found = [match[0] for match in MEASURED.finditer(prose(page))]
        assert not found or str(page.relative_to(ROOT)) in BY_HAND, (page.name, found)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_that_lead_nowhere_are_found(tmp_path, run_script):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "there.md").write_text("# A `b` and [c](../README.md)!\n\n```\n# no heading\n[x](y)\n```\n")
    good = "[1](docs/there.md) [2](docs/there.md#a-b-and-c) [3](https://nowhere.example) ![4](docs) [5](#top) `[6](z)`"
    bad = "[1](gone.md) [2](docs/there.md#no-heading) [3](#bottom)"
    (tmp_path / "README.md").write_text(f"# Top\n{good}\n{bad}\n")
    expected = ["gone.md", "docs/there.md#no-heading", "#bottom"]
    assert links.broken(tmp_path) == [f"README.md: {link}" for link in expected]


def test_this_repositorys_links_lead_somewhere():
    assert links.broken(ROOT) == []


def runs_of(scales, **arguments):
    return [make_run(scale, seed=seed, **arguments) for seed, scale in enumerate(scales)]


def test_the_headline_has_a_row_for_each_technique_with_its_interval_and_what_was_published():
    runs = runs_of((1.0, 1.1, 0.9)) + runs_of((0.5, 0.52, 0.48), precision="fp16", half_precision="float16", acc=91.0)
    runs += runs_of((2.0,), num_worker=0) + [make_run(num_worker=4)]
    half, none = read_table(headline.render(runs))
    assert none["Technique"].startswith("Loading without worker processes")
    assert none["Change in result"] == "none: identical numbers"
    assert none["Published (one A100), ×"] == "time 1.52"
    # 0.5, 0.473 and 0.533 of the run with the same seed: the logarithms scatter by 0.0604, and t is 4.30.
    assert half["Time, ×"] == "0.50 (0.43 to 0.58)"
    assert half["Change in result"] == "best epoch: +1.0 points (+1.0 to +1.0); last epoch: +1.0 points (+1.0 to +1.0)"
    assert (half["n"], half["Memory, ×"]) == ("3", "1.00")
    assert half["Published (one A100), ×"] == "time 0.76"


def test_real_pictures_are_shown_before_digits_and_instead_of_them():
    digits = [make_run(dataset="digits", device="cpu"), make_run(1.5, dataset="digits", device="cpu", num_worker=0)]
    digits += [make_run(2.0, dataset="digits", device="cpu", half_precision="float16", precision="bf16")]
    cifar = {"dataset": "folder", "data_dir": "cifar10"}
    real = [make_run(**cifar), make_run(0.7, half_precision="float16", precision="fp16", **cifar)]
    real += [make_run(0.3, experiment="resnext_fast", loader="device", lr=0.1, save_every=1.0, **cifar)]

    def shown(runs):
        rows = read_table(headline.render(runs))
        return [(row["Technique"].partition(":")[0], row["Time, ×"], row["Measured on"]) for row in rows]

    expected = [
        ("Everything on, with a new recipe (Muon, one-cycle learning rate)", "0.30", "CIFAR-10 (1)"),
        ("Half precision", "0.70", "CIFAR-10 (1)"),
        ("Loading without worker processes", "1.50", "handwritten digits (2)"),
    ]
    for run in digits:
        run.machine["hardware"] = real[0].machine["hardware"]
    assert shown(digits + real) == expected
    for run in digits:
        run.machine["hardware"] = "AMD EPYC"
    other = [
        (*row[:2], row[2].replace(" (", ", NVIDIA A100 (" if "CIFAR" in row[2] else ", AMD EPYC (")) for row in expected
    ]
    other.insert(2, ("Half precision", "2.00", "handwritten digits, AMD EPYC (2)"))
    assert shown(digits + real) == other
    assert "(1) resnext29_4x64d, CIFAR-10, 3 epochs; NVIDIA A100" in headline.render(digits + real)
    for run in real:
        for epoch in run.epochs:
            epoch["timing"]["phases"]["data load"]["device_ms"]["total"] *= 2
    assert "8.0 % of the step time is spent waiting" in sentences.bullets(real, [])
    # Both numbers of the sentence are of one group.
    assert "4.0 % of the step time is spent waiting for images; without workers" in sentences.bullets(digits + real, [])


def test_another_machine_has_a_row_of_its_own_where_it_says_something_else():
    def measured(hardware, *scales):
        runs = runs_of((1.0, 1.1, 0.9)) + runs_of((1.0, 1.02, 0.98), num_worker=0)
        runs += runs_of(scales, precision="fp16", half_precision="float16", acc=91.0)
        for run in runs:
            run.machine["hardware"] = hardware
        return runs

    runs = measured("AMD EPYC, AVX-512", 0.5, 0.52, 0.48) + measured("AMD EPYC, AVX2", 2.0, 2.1, 1.9)
    runs += measured("AMD EPYC, SSE", 0.52, 0.54, 0.5)
    shown = [row["Technique"].partition(":")[0] for row in read_table(headline.render(runs))]
    assert shown == ["Half precision", "Half precision", "Loading without worker processes"]
    assert len(read_table(headline.render(runs, "mixed-precision"))) == 3
    # Of single runs nothing is known to be the same.
    singles = [make_run(), make_run(0.5, precision="fp16", half_precision="float16", num_worker=2)]
    others = [make_run(), make_run(0.5, precision="fp16", half_precision="float16", num_worker=2)]
    for run in others:
        run.machine["hardware"] = "AMD EPYC"
    assert len(read_table(headline.render(singles + others))) == 2


def test_of_several_evaluations_the_smallest_gain_is_told():
    def evaluation(chosen):
        figures = {"generator": 0.30, "Bayes risk": 0.32, "SimCLS": chosen}
        return {
            "systems": {
                name: {metric: {"mean": mean} for metric in ("rouge1", "rouge2", "rougeL")}
                for name, mean in figures.items()
            },
            "strongest": "Bayes risk",
            "arguments": {"dataset_name": "sample"},
            "documents": 50,
        }

    line = sentences.bullets([], [evaluation(0.36), evaluation(0.34), evaluation(0.38)])
    expected = (
        "on 50 docstrings of Python packages, ROUGE-1 / 2 / L go from {0} / {0} / {0} to {1} / {1} / {1}; "
        "the best rule without a scorer (Bayes risk) has {2} / {2} / {2}"
    )
    assert expected.format("30.0", "34.0", "32.0") in line


def test_the_first_figure_has_a_row_of_panels_for_each_place():
    runs = [make_run(dataset="digits", device="cpu"), make_run(1.5, dataset="digits", device="cpu", num_worker=0)]
    runs += [make_run(), make_run(0.7, half_precision="float16", precision="fp16")]
    panels = headline_figures.draw(headline.effects(runs)).axes
    labels = [[text.get_text() for text in panel.get_yticklabels()] for panel in panels[::2]]
    assert labels == [["half precision (fp16)"], ["loading without workers"]]
    assert [panel.patches[0].get_width() for panel in panels[::2]] == pytest.approx([-0.3, 0.5])
    assert "CIFAR-10, 3 epochs; NVIDIA A100" in panels[0].texts[-1].get_text()


def test_a_long_line_over_a_panel_is_broken_and_stays_within_the_figure():
    runs = [make_run(), make_run(0.7, half_precision="float16", precision="fp16")]
    for run in runs:
        run.machine["hardware"] = "AMD EPYC, 2 cores, AVX-512, bfloat16, and a name that is as long as names can be"
    figure = headline_figures.draw(headline.effects(runs))
    figure.canvas.draw()
    line = figure.axes[0].texts[-1]
    assert "\n" in line.get_text()
    assert line.get_window_extent().x1 < figure.bbox.x1


def test_only_half_precision_is_called_so():
    runs = [make_run(), make_run(1.4, true_fp32=True, precision="fp32")]
    assert headline.render(runs) == ""
    runs += [make_run(0.8, half_precision="float16", precision="fp16")]
    (row,) = read_table(headline.render(runs))
    assert row["Time, ×"] == "0.80"
    kept = [make_run(device="cpu"), make_run(0.6, device="cpu", keep_memory=True)]
    (row,) = read_table(headline.render(kept))
    assert row["Technique"].startswith("Keeping freed memory")
    assert row["Change in result"] == headline.SAME


def test_two_machines_of_one_kind_share_no_row(tmp_path):
    for folder, scale in (("gpu", 1.0), ("gpu_b", 2.0)):
        for workers in (2, 0):
            path = tmp_path / "benchmarks" / "results" / folder / "runs" / "cifar10" / f"resnext_{workers}.json"
            write(path, make_record(scale, num_worker=workers))
    runs, _ = records.read_folders([tmp_path])
    text = tables.render(studies.DATA_LOADER, runs)
    assert [row["n"] for number in (0, 1) for row in read_table(text, number)] == ["1"] * 4
    assert "A100, machine b, torch" in text
    assert records.machine_letter(tmp_path / "results" / "of_mine" / "run.json") is None


def test_flags_that_tell_rows_apart_stand_in_order():
    """Not as a set has them, which is another in every process."""
    fast = {"experiment": "resnext_fast", "half_precision": "bfloat16"}
    runs = [make_run(), make_run(**fast), make_run(**fast, d=1, a=2, c=3, b=4)]
    labels = [row["Set-up"] for row in read_table(tables.render(studies.TOGETHER, runs))]
    assert "everything on (--a 2, --b 4, --c 3, --d 1)" in labels


def test_records_that_know_little_of_their_machine_are_shown():
    """The hardware, the versions, the commit and the date are no must."""
    runs = [make_run(), make_run(0.8, half_precision="float16", precision="fp16")]
    for run in runs:
        run.record["machine"] = {"device": "cuda"}
    text = headline.render(runs)
    assert text.endswith("; unknown hardware.")
    assert place_line_of(runs).endswith("unknown hardware; n = 1")


def place_line_of(runs):
    (effect,) = headline.effects(runs)
    return headline_figures.place_line(effect.where, [effect])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!-- report:nothing -->\n<!-- /report:nothing -->", "names no table; choose from"),
        ("<!-- report:runs -->\ntext", "no partner"),
        ("text <!-- /report:runs -->", "no partner"),
        ("<!-- report:runs -->\n<!-- /report:phases -->", "no partner"),
        ("<!-- report:runs -->\n<!-- report:phases -->\n<!-- /report:phases -->\n<!-- /report:runs -->", "no partner"),
    ],
)
def test_wrong_markers_leave_the_readme_alone(tmp_path, text, reason):
    good, readme = tmp_path / "GOOD.md", tmp_path / "README.md"
    good.write_text("<!-- report:runs -->\nold\n<!-- /report:runs -->")
    before = good.read_text()
    readme.write_text(text)
    with pytest.raises(UserError, match=reason):
        rewrite([good, readme], {"runs": "new", "phases": "new"})
    assert (good.read_text(), readme.read_text()) == (before, text)


@pytest.mark.parametrize("text", ['{"cells": [', '{"a": "<!-- report:x -->"}', "[1]", '{"cells": [{"source": 3}]}'])
def test_a_damaged_notebook_is_told(tmp_path, text):
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(UserError, match="x.ipynb is not a notebook"):
        rewrite([tmp_path / "x.ipynb"], {"x": "new"})


def test_another_recipe_is_compared_by_the_best_epochs():
    def trained(experiment, *ends, **more):
        runs = []
        for seed, (best, last) in enumerate(ends):
            run = make_run(experiment=experiment, seed=seed, **more)
            for epoch, acc in zip(run.epochs, (50.0, best, last), strict=True):
                epoch["test_acc"] = acc
            runs.append(run)
        return runs

    runs = trained("resnext", (67.0, 60.0), (68.0, 67.0))  # The last epochs are a draw.
    runs += trained("resnext_fast", (82.5, 82.5), (83.0, 83.0), (82.8, 82.8), loader="device", lr=0.1, save_every=1.0)
    (row,) = read_table(headline.render(runs))
    assert row["Change in result"] == (
        "best epoch: +15.2 points (+12.1 to +18.4); last epoch: +19.2 points (-22.0 to +60.5)"
    )


def test_results_are_the_same_where_each_seed_s_are():
    runs = [make_run(seed=seed, acc=80.0 + seed) for seed in (0, 1)]
    runs += [make_run(seed=seed, acc=81.0 - seed, num_worker=0) for seed in (0, 1)]
    (row,) = read_table(headline.render(runs))
    assert row["Change in result"].startswith("best epoch: +0.0 points")


def test_a_scorer_of_few_updates_shows_no_result():
    names = {"num_worker": None, "loader": None, "num_workers": 4, "experiment": "simcls"}
    runs = [make_run(use_checkpoint=redone, **names) for redone in (False, True)]
    for updates, told in ((99, "not known: 99 updates"), (100, headline.SAME)):
        for run in runs:
            run.epochs[-1] |= {"losses": [[updates, 0.5]], "val_loss": 0.5}
        (row,) = read_table(headline.render(runs, "simcls"))
        assert row["Change in result"] == told
    runs[1].epochs[-1]["losses"] = [[99, 0.5]]
    assert headline.render(runs) == ""  # The page of all shows what is known.


def test_published_times_and_memory_stand_beside_ours_and_n_is_of_the_smaller_side():
    runs = runs_of((1.0, 1.1)) + runs_of((1.4,), experiment="resnext_checkpoint", policy="nested")
    (row,) = read_table(headline.render(runs))
    assert (row["n"], row["Published (one A100), ×"]) == ("1", "time 1.43, memory 0.65")
