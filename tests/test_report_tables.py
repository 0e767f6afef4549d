"""The tables of the report on hand-made records: what is compared with what, and the published figures."""

import copy
from pathlib import Path

import pytest
from run_records import make_record, make_run, read_table, rows_of

from reporting import overview, published, sentences, studies, tables
from reporting.records import Record
from reporting.studies import CHECKPOINTING, DATA_LOADER, MIXED_PRECISION


def test_data_loader_table():
    runs = [make_run(), make_run(1.5, num_worker=0), make_run(0.9, loader="device"), make_run(1.0, num_worker=1)]
    rows = rows_of(DATA_LOADER, runs)
    assert list(rows) == ["2 workers (baseline)", "0 workers", "1 worker", "device"]
    assert rows["0 workers"]["Step, ms"] == "150"
    assert rows["0 workers"]["Step, ×"] == "1.50"
    assert rows["0 workers"]["Epoch, s"] == "60.0"
    assert rows["0 workers"]["A100: load, ms"] == "63"
    assert rows["device"]["A100: load, ms"] == "–"
    assert rows["device"]["Load, % of step"] == "4.0"


def test_a_caption_tells_how_long_the_runs_really_were():
    for changes, told in (({"num_epoch": 200}, "200 epochs"), ({"num_epoch": 1}, "1 epoch"),
                          ({"num_epoch": 200, "max_steps": 30}, "30 steps"), ({"max_steps": 1}, "1 step")):  # fmt: skip
        found = tables.groups(DATA_LOADER, [make_run(**changes), make_run(num_worker=0, **changes)])
        assert f", {told}; " in tables.caption(found[0], found)


@pytest.mark.parametrize("changes", [{"model": "resnext29_2x4d"}, {"dataset": "digits"}, {"batch_size": 64}])
def test_published_figures_stand_beside_the_same_experiment_alone(changes):
    rows = rows_of(DATA_LOADER, [make_run(**changes), make_run(num_worker=0, **changes)])
    assert not [header for header in rows["0 workers"] if "A100" in header]


def test_mixed_precision_table():
    half = [make_run(0.7 + 0.01 * seed, precision="fp16", half_precision="float16", seed=seed) for seed in range(3)]
    single = [make_run(seed=seed) for seed in range(3)]
    rows = rows_of(MIXED_PRECISION, [*single, *half, make_run(1.6, precision="fp32", true_fp32=True)])
    assert list(rows) == ["tf32 (baseline)", "fp32", "fp16"]
    assert (rows["fp16"]["n"], rows["fp16"]["Step, ms"]) == ("3", "71.0 ± 1.0")
    assert rows["fp16"]["Step, ×"] == "0.71 (0.69 to 0.74)"
    assert rows["fp16"]["A100: overall, s"] == "6744"
    assert rows["fp32"]["A100: step, ms"] == "–"  # The original never ran it.


def test_a_row_is_compared_with_the_runs_of_its_own_seeds():
    """Seeds of the baseline that a row has not tell nothing of it: their steps were of other data, in other hours."""
    base = [make_run(1.0 + seed, seed=seed) for seed in range(3)]
    rows = rows_of(DATA_LOADER, [*base, make_run(2.2, num_worker=0, seed=1)])
    assert rows["2 workers (baseline)"]["Step, ms"] == "200 ± 100"
    assert rows["0 workers"]["Step, ×"] == "1.10"
    for run, size in zip(base, (0, 2**30, 2**30), strict=True):  # What is nothing in all shared seeds has no multiple.
        run.record["saved_activation_bytes"] = size
    one_seed = rows_of(CHECKPOINTING, [*base, make_run(experiment="resnext_checkpoint", policy="chain", saved=2**20)])
    assert one_seed["chain"]["Saved, ×"] == "–"
    assert tables.markdown([{"A": "two\nlines"}]).endswith("| two lines |")


def test_the_same_arithmetic_by_other_flags_is_no_repeat():
    """On a CPU --true_fp32 changes nothing, and every half precision is bfloat16: they are rows of their own."""
    cpu = {"device": "cpu", "precision": "fp32"}
    half = {"device": "cpu", "precision": "bf16"}
    runs = [
        make_run(1.0, **cpu),
        make_run(1.2, **cpu, true_fp32=True),
        make_run(0.5, **half, half_precision="float16"),
        make_run(0.6, **half, half_precision="bfloat16"),
        make_run(0.7, **half, half_precision="bfloat16", seed=1),
    ]
    rows = rows_of(MIXED_PRECISION, runs)
    assert {name: (row["n"], row["Step, ms"]) for name, row in rows.items()} == {
        "fp32 (baseline)": ("1", "100"),
        "fp32 (--true_fp32 True)": ("1", "120"),
        "bf16 (--half_precision float16)": ("1", "50.0"),
        "bf16 (--half_precision bfloat16)": ("2", "65.0 ± 7.1"),
    }


def test_workers_beside_the_device_loader_make_no_repeat():
    rows = rows_of(DATA_LOADER, [make_run(), *(make_run(loader="device", num_worker=number) for number in (0, 2))])
    assert list(rows) == ["2 workers (baseline)", "device (--num_worker 0)", "device (--num_worker 2)"]


def test_a_device_loader_that_fell_back_to_workers_is_called_so_and_is_no_baseline():
    fallen_back = make_run(1.1, loader="device")
    fallen_back.record["loading"] = "workers"
    rows = rows_of(DATA_LOADER, [fallen_back, make_run(), make_run(num_worker=0)])
    assert list(rows) == ["2 workers (baseline)", "0 workers", "2 workers (--loader device)"]
    assert rows["2 workers (--loader device)"]["Step, ×"] == "1.10"


def test_of_several_runs_with_one_seed_the_latest_counts():
    runs = [make_run(), make_run(0.9, num_worker=0), make_run(0.5, num_worker=0), make_run(0.7, num_worker=0, seed=1)]
    for run, date in zip(runs, ("2026-01-01", "2026-01-03", "2026-01-02", "2026-01-01"), strict=True):
        run.machine["date"] = date
    row = rows_of(DATA_LOADER, runs)["0 workers"]
    assert (row["n"], row["Step, ms"]) == ("2", "80.0 ± 14.1")
    listed = read_table(overview.every_run(runs))
    assert [row["n"] for row in listed] == ["1", "2"]


def test_checkpointing_table_has_a_baseline_for_each_batch_size():
    redo = {"experiment": "resnext_checkpoint", "memory_budget": None}
    runs = [
        make_run(),
        make_run(1.4, saved=2**29, policy="nested", **redo),
        make_run(1.1, saved=2**28, **(redo | {"policy": "chain", "memory_budget": 0.25, "budget_of": "peak"})),
        make_run(4.0, saved=2**32, batch_size=512),
        make_run(4.4, saved=2**31, batch_size=512, policy="chain", **redo),
        make_run(9.0, saved=2**32, batch_size=896, policy="nested", **redo),
    ]
    table = read_table(tables.render(CHECKPOINTING, runs))
    rows = {(row["Batch size"], row["Recomputed in backward"]): row for row in table}
    assert list(rows) == [
        ("128", "none (baseline)"), ("128", "nested"), ("128", "budget 0.25"),
        ("512", "none (baseline)"), ("512", "chain"), ("896", "nested"),
    ]  # fmt: skip
    assert rows["128", "nested"]["Step, ×"] == "1.40"
    assert rows["128", "budget 0.25"]["Saved, ×"] == "0.25"
    assert rows["512", "chain"]["Step, ×"] == "1.10"  # Of the plain run at 512.
    assert rows["896", "nested"]["Step, ×"] == "–"  # There is none at 896.
    assert rows["896", "nested"]["A100: optimizer, ms"] == "560"
    assert rows["128", "none (baseline)"]["A100: memory, GB"] == "7.82"
    assert rows["128", "nested"]["Saved, % of peak"] == "6.7"


@pytest.mark.parametrize(
    "changes", [{"device": "cpu"}, {"model": "resnext29_2x16d"}, {"dataset": "digits"}, {"batch_size": 64}, {"lr": 0.1}]
)
def test_what_differs_elsewhere_is_not_compared(changes):
    """A slow run on other hardware, or of another model, data, batch or setting, is no baseline and no arm."""
    runs = [make_run(), make_run(0.5, num_worker=8), make_run(7.0, num_worker=0, **changes)]
    markdown = tables.render(DATA_LOADER, runs)
    assert [row["Loading"] for row in read_table(markdown)] == ["2 workers (baseline)", "8 workers"]
    assert "0 workers" not in markdown
    both = tables.render(DATA_LOADER, [*runs, make_run(3.5, **changes)])
    rows = [{row["Loading"]: row["Step, ×"] for row in read_table(both, number)} for number in range(2)]
    assert {"2 workers (baseline)": "1.00", "8 workers": "0.50"} in rows
    assert {"2 workers (baseline)": "1.00", "0 workers": "2.00"} in rows


def test_times_of_a_cpu_can_be_left_out():
    runs = [make_run(device="cpu"), make_run(1.5, device="cpu", num_worker=0)]
    everything, ratios = rows_of(DATA_LOADER, runs), rows_of(DATA_LOADER, runs, with_cpu_times=False)
    assert everything["0 workers"]["Step, ms"] == "150"
    assert "Step, ms" not in ratios["0 workers"]
    assert ratios["0 workers"]["Step, ×"] == "1.50"
    on_gpu = rows_of(DATA_LOADER, [make_run(), make_run(1.5, num_worker=0)], with_cpu_times=False)
    assert on_gpu["0 workers"]["Step, ms"] == "150"
    assert "Step, ms" not in overview.step_phases(runs, with_cpu_times=False)
    assert "Epoch, s" not in overview.every_run(runs, with_cpu_times=False)


def test_simcls_table():
    names = {"num_worker": None, "loader": None, "num_workers": 4, "use_checkpoint": False, "model_type": "demo"}
    runs = [
        make_run(experiment="simcls", **names),
        make_run(0.5, experiment="simcls", precision="fp16", **names | {"half_precision": "float16"}),
        make_run(1.2, saved=2**29, experiment="simcls", **names | {"use_checkpoint": True}),
        make_run(1.3, experiment="simcls", **names | {"num_workers": 0}),
    ]
    for run in runs:
        run.epochs[-1].update({"val_rouge1": 0.4, "val_rouge2": 0.2, "val_rougeL": 0.3})
    rows = rows_of(studies.SIMCLS, runs)
    assert list(rows) == ["4 workers (baseline)", "0 workers", "4 workers, fp16", "4 workers, recomputation"]
    assert rows["4 workers, fp16"]["Step, ×"] == "0.50"
    assert rows["4 workers, recomputation"]["Saved, ×"] == "0.50"
    assert rows["0 workers"]["Validation ROUGE, %"] == "30.0"


def test_evaluation_table():
    interval = {"mean": 0.3, "low": 0.281, "high": 0.3249}
    record = {
        "machine": {"command": "evaluate_model.py --samples test", "hardware": "AMD EPYC, 2 cores"}, "documents": 50,
        "arguments": {"samples": "test", "scorer_path": "a", "output": "a"},
        "systems": {"generator": {"rouge1": interval, "rougeL": interval}},
        "p_values": {"generator": {"rouge1": 0.00412, "rougeL": 1}},
    }  # fmt: skip
    text = overview.evaluations([record])
    assert "50 documents, 95 % intervals; AMD EPYC, 2 cores:" in text
    assert "Command: `evaluate_model.py --samples test`" in text
    (generator,), (p_value,) = read_table(text), read_table(text, 1)
    assert generator == {
        "Summary": "generator", "ROUGE-1, %": "30.00 (28.10 to 32.49)", "ROUGE-L, %": "30.00 (28.10 to 32.49)",
    }  # fmt: skip
    assert (p_value["ROUGE-1"], p_value["ROUGE-L"]) == ("0.0041", "1")

    other = copy.deepcopy(record)
    other["arguments"] |= {"scorer_path": "b", "output": "b"}
    other["systems"]["generator"]["rouge1"]["mean"] = 0.4
    other["p_values"]["generator"]["rouge1"] = 0.5
    text = overview.evaluations([record, other])
    assert "mean ± standard deviation over 2 scorers" in text
    (generator,), (p_value,) = read_table(text), read_table(text, 1)
    assert generator["ROUGE-1, %"] == "35.00 ± 7.07"
    assert p_value["ROUGE-1"] == "0.5"
    # What one of the scorers alone has is told as that.
    other["systems"]["scorer alone"] = {"rouge1": interval}
    other["p_values_alone"] = {"generator": {"rouge1": 0.2}}
    text = overview.evaluations([record, other])
    assert read_table(text)[1] == {"Summary": "scorer alone (1 of 2 scorers)", "ROUGE-1, %": "30.00", "ROUGE-L, %": "–"}
    assert read_table(text, 1) == [
        {"Test": "SimCLS against generator", "ROUGE-1": "0.5", "ROUGE-L": "1"},
        {"Test": "scorer alone against generator (1 of 2 scorers)", "ROUGE-1": "0.2", "ROUGE-L": "–"},
    ]
    renamed = copy.deepcopy(record)
    renamed["systems"]["generator"]["rouge9"] = renamed["systems"]["generator"].pop("rouge1")
    assert overview.evaluations([record, renamed]).count("95 % intervals") == 2
    for epochs, tables_of in ((2, 1), (1, 2)):  # Only seeds of one set-up are averaged.
        trained = [each | {"training": f"{given} epochs"} for each, given in ((record, 2), (other, epochs))]
        assert overview.evaluations(trained).count("50 documents") == tables_of
    other["arguments"]["samples"] = "elsewhere"
    assert overview.evaluations([record, other]).count("95 % intervals") == 2


def test_the_originals_figures_stay_as_published():
    before = copy.deepcopy((published.DATA_LOADER, published.MIXED_PRECISION, published.CHECKPOINTING))
    table = read_table(overview.original_study())
    assert {row["Arm"]: row for row in table if row["Batch"] == "128"}["2 workers"] == {
        "Arm": "2 workers", "Batch": "128", "Load, ms": "1.6", "Optimizer, ms": "28", "Step, ms": "104",
        "Epoch, s": "44.5", "Overall, s": "8934", "Memory, GB": "7.82",
    }  # fmt: skip
    assert before == (published.DATA_LOADER, published.MIXED_PRECISION, published.CHECKPOINTING)


@pytest.mark.parametrize("other", [{"versions": {"torch": "2.0.0"}}, {"threads": 1}])
def test_runs_of_another_release_or_of_other_threads_are_not_compared(other):
    runs = [make_run(scale, device="cpu", num_worker=number) for scale, number in ((1.0, 2), (0.5, 8), (7.0, 0))]
    runs[2].machine.update(other)
    assert list(rows_of(DATA_LOADER, runs)) == ["2 workers (baseline)", "8 workers"]


def test_what_is_switched_off_and_what_an_old_record_does_not_name_are_the_same():
    runs = [make_run(), make_run(2.0, num_worker=0)]
    del runs[1].arguments["true_fp32"]
    assert rows_of(DATA_LOADER, runs)["0 workers"]["Step, ×"] == "2.00"
    names = [studies.recomputation_label(make_run(memory_budget=0.25, budget_of=of)) for of in (None, "held", "peak")]
    assert names == ["held 0.25", "held 0.25", "budget 0.25"]  # All were of what is held, before there was a choice.


def test_everything_is_compared_with_the_original_s_way_as_it_was_and_of_the_same_batch():
    fast = {"experiment": "resnext_fast", "lr": 0.1}
    runs = [make_run(2.0, lr=0.5), make_run(3.0, deterministic=True), make_run(), make_run(0.5, **fast)]
    assert rows_of(studies.TOGETHER, runs)["everything on"]["Epoch, ×"] == "0.50"
    runs += [make_run(4.0, batch_size=512), make_run(1.0, batch_size=512, half_precision="float16", precision="fp16")]
    assert rows_of(studies.TOGETHER, runs)["half precision (fp16)"]["Epoch, ×"] == "0.25"


def test_the_sentence_on_recomputation_is_of_what_saves_most():
    redo = {"experiment": "resnext_checkpoint"}
    runs = [make_run(), make_run(1.1, policy="chain", **redo), make_run(1.3, policy="block", **redo)]
    for run, share in zip(runs, (1, 0.5, 0.25), strict=True):
        for epoch in run.epochs:
            epoch["timing"]["peak_memory"]["allocated_bytes"] *= share
    assert "0.25 × the memory for 1.30 × the time, with identical results (" in sentences.bullets(runs, [])
    runs[2].epochs[0]["test_acc"] += 0.5
    assert "0.25 × the memory for 1.30 × the time (" in sentences.bullets(runs, [])


def test_trials_of_faults_are_counted_by_kind():
    trials = [{"fault": fault, "tried": tried, "survived": survived}
              for fault, tried, survived in (("full disk", 3, 2), ("SIGKILL", 1, 1), ("full disk", 2, 2))]  # fmt: skip
    record = {"benchmark": "faults", "trials": trials, "machine": {"hardware": "AMD EPYC"}}
    text = sentences.faults({"AMD EPYC": [record, {"benchmark": "rouge"}]})
    assert text.startswith("5 of 6 trials lost nothing; AMD EPYC; ")
    assert read_table(text) == [
        {"Fault": "full disk", "Trials": "5", "Nothing lost": "4"},
        {"Fault": "SIGKILL", "Trials": "1", "Nothing lost": "1"},
    ]


def test_two_results_of_one_set_up_and_seed_are_told_once(capsys):
    runs = [Record(Path(f"{number}/x.json"), make_record()) for number in (1, 2, 3)]
    for number, run in enumerate(runs, 1):
        run.record["machine"]["date"] = f"2026-11-0{number}"
    older, newer, same = runs
    for epoch in older.record["epochs"]:
        epoch["loss"] += 1
    assert tables.one_a_seed([newer, older]) == tables.one_a_seed([older, newer]) == [newer]
    assert tables.one_a_seed([newer, same]) == [same]
    (told,) = capsys.readouterr().err.splitlines()
    assert "1/x.json and 2/x.json have the same settings and seed, but other results; only the later" in told
