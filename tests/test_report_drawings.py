"""What the figures of runs show: which runs they choose, how they tell them apart, and what they say."""

import itertools

import matplotlib.pyplot as plt
import pytest
from run_records import make_run

from reporting import figures, tables
from reporting.studies import CHECKPOINTING, DATA_LOADER, MIXED_PRECISION, TOGETHER

POLICIES = [
    "no recomputation",
    *(f"recomputing {what}" for what in ("all but convolutions", "whole blocks", "whole stages")),
]
CHECKPOINT = {"experiment": "resnext_checkpoint", "memory_budget": None}


@pytest.fixture(autouse=True)
def _no_figure_stays():
    yield
    plt.close("all")


def with_epochs(run, number):
    """`run`, with `number` epochs of its last one's kind."""
    epochs = [run.epochs[-1] | {"epoch": epoch + 1, "loss": 1 / (epoch + 1)} for epoch in range(number)]
    run.record["epochs"] = epochs
    return run


def title(figure):
    return figure._suptitle.get_text()


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def large_study():
    """The checkpointing runs of `bash run.sh resnext`: three policies and the plain run at three batch sizes."""
    runs = []
    for batch_size in (128, 512, 896):
        scale = batch_size / 128
        runs.append(make_run(scale, batch_size=batch_size))
        for policy, time, share in (("chain", 1.05, 0.5), ("block", 1.3, 0.25), ("nested", 1.45, 0.4)):
            run = make_run(scale * time, batch_size=batch_size, policy=policy, **CHECKPOINT)
            for epoch in run.epochs:
                epoch["timing"]["peak_memory"]["allocated_bytes"] *= share
            runs.append(run)
    return runs


def test_curves_that_coincide_are_said_to():
    runs = [make_run(), make_run(num_worker=0), make_run(loader="device")]
    assert title(figures.draw_curves(runs, DATA_LOADER)).endswith("\nall 3 curves coincide")
    # Runs of seeds that not all rows have are other curves: of one technique they are left out.
    more = make_run(seed=1)
    assert "n = 1" in title(figures.draw_curves([*runs, more], DATA_LOADER))
    assert "n = 1 to 2" in title(figures.draw_curves([*runs, more], TOGETHER))
    runs[1].epochs[1]["test_acc"] += 0.5
    assert "coincide" not in title(figures.draw_curves(runs, DATA_LOADER))


def test_losses_that_coincide_for_each_seed_are_said_to():
    names = {"num_worker": None, "loader": None, "num_workers": 4, "use_checkpoint": False}
    runs = [make_run(experiment="simcls", **names | {"num_workers": n, "seed": s}) for n in (4, 0) for s in (0, 1)]
    for run in runs:
        run.epochs[0]["losses"] = [[1, 0.5], [2, 0.4 + 0.1 * run.arguments["seed"]]]
    assert title(figures.draw_losses(runs)).endswith("\nall 2 curves coincide; bands: lowest to highest run")
    assert "n = 1;" in title(figures.draw_losses(runs[:-1]))  # Seed 1 has one curve, which is left out.
    runs[-1].epochs[0]["losses"][1][1] = 0.6
    assert "coincide" not in title(figures.draw_losses(runs))


def test_many_losses_are_shown_as_running_means_over_the_seeds():
    names = {"num_worker": None, "loader": None, "num_workers": 4, "use_checkpoint": False}
    runs = [make_run(experiment="simcls", **names | {"num_workers": n, "seed": s}) for n in (4, 0) for s in (0, 1)]
    for run in runs:
        level = 0.3 + 0.2 * run.arguments["seed"]
        run.epochs[0]["losses"] = [[update, level + 0.1 * (-1) ** update] for update in range(1, 41)]
    (panel,) = figures.draw_losses(runs).axes
    assert panel.get_ylabel() == "training loss, mean of the last 2 points"
    assert list(panel.lines[0].get_xdata()) == list(range(2, 41))
    assert panel.lines[0].get_ydata() == pytest.approx(0.4)
    heights = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.3, 0.5))


def test_curves_are_of_the_longest_runs():
    def runs(number, device, **changes):
        arms = ({}, {"num_worker": 0}, {"num_worker": 1})
        made = [make_run(device=device, num_epoch=number, **arm, **changes) for arm in arms]
        return [with_epochs(run, number) for run in made]

    def shown(*groups):
        found = figures.chosen_for_curves(DATA_LOADER, list(itertools.chain(*groups)))
        return tables.hardware(found.rows[0].runs[0])["hardware"], found.settings["num_epoch"]

    many_rows, long = runs(2, "cpu"), runs(6, "cpu")[:2]
    assert shown(many_rows, long) == ("AMD EPYC, 2 cores", 6)
    assert shown(many_rows) == ("AMD EPYC, 2 cores", 2)  # Better than none.
    assert shown(runs(2, "cuda"), long) == ("AMD EPYC, 2 cores", 6)
    assert shown(runs(3, "cuda"), long) == ("NVIDIA A100", 3)


def test_a_large_study_of_memory_has_a_colour_a_policy_and_a_marker_a_batch_size():
    figure = figures.draw_memory(large_study())
    (panel,) = figure.axes
    assert sorted(text.get_text() for text in panel.texts) == POLICIES
    assert legend(figure) == ["batch 128", "batch 512", "batch 896"]
    points = [line for line in panel.lines if line.get_marker() != "None"]
    assert len(points) == 12
    assert len({(line.get_color(), line.get_marker()) for line in points}) == 12
    assert len({line.get_color() for line in points}) == 4


def test_a_small_study_of_memory_needs_no_legend():
    figure = figures.draw_memory(large_study()[:4])
    assert legend(figure) == []
    assert "batch 128" in title(figure)


def test_memory_without_a_baseline_is_no_picture():
    assert figures.draw_memory([run for run in large_study() if "policy" in run.arguments]) is None


def test_curves_of_a_large_study_have_a_colour_a_policy_and_a_style_a_batch_size():
    figure = figures.draw_curves(large_study(), CHECKPOINTING)
    assert sorted(legend(figure)) == ["batch 128", "batch 512", "batch 896", *POLICIES]
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 12


@pytest.mark.parametrize("number", [3, 10, 11, 25])
def test_no_colour_comes_twice(number):
    colours = figures.distinct_colours(f"budget {each}" for each in range(number))
    assert len(colours) == number
    assert len({tuple(colour) for colour in colours.values()}) == number


def bars(runs):
    figure = figures.draw_timeline(runs, (DATA_LOADER, MIXED_PRECISION, CHECKPOINTING))
    return figure, [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_the_time_line_of_a_gpu_names_arms_and_clocks():
    _, names = bars([make_run(), make_run(loader="device"), make_run(policy="chain", **CHECKPOINT)])
    assert names == [
        f"{name}, {side} time"
        for name in ("original", "images on the training device", "recomputing all but convolutions")
        for side in ("host", "GPU")
    ]  # fmt: skip


def test_on_a_cpu_each_bar_is_scaled_by_the_baseline_of_its_own_group():
    """Two groups, of 2 and of 6 epochs; the second ran on a machine that had become twice as slow."""
    cpu = {"device": "cpu", "precision": "fp32"}
    half = {"device": "cpu", "precision": "bf16", "half_precision": "float16"}
    runs = [make_run(1.0, num_epoch=2, **cpu), make_run(1.5, num_epoch=2, num_worker=0, **cpu)]
    runs += [make_run(2.0, num_epoch=6, **cpu), make_run(1.6, num_epoch=6, **half)]
    figure, names = bars(runs)
    assert names == ["original", "loading without workers", "half precision (bf16)"]
    lengths = {}
    for bar in figure.axes[0].patches:
        position = round(bar.get_y() + bar.get_height() / 2)
        lengths[names[position]] = lengths.get(names[position], 0) + bar.get_width()
    assert lengths == pytest.approx(dict(zip(names, (1.0, 1.5, 0.8), strict=True)))
    assert figure.axes[0].get_xlabel() == "step time, × that of the run without the technique"


def test_letters_that_no_font_draws_are_told_in_one_line(tmp_path, capsys, recwarn):
    for name in ("cat", "\u732b\u732b\u4e00"):
        figure, axes = plt.subplots()
        axes.set_title(name)
        figures.save(figure, tmp_path / f"{name.isascii()}.png")
        told = capsys.readouterr().err
        assert told.count("\n") == (name != "cat")
    assert "the font lacks some letters" in told
    assert not recwarn
