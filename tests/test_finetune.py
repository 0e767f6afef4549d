"""Making models from scratch and fine-tuning them, as a user does: by command."""

import contextlib
import json
import os
from types import SimpleNamespace

import launch
import pytest
import torch
import transformers

pytestmark = pytest.mark.slow

FINETUNE = "SimCLS/finetune_model.py"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
SIZE = [
    "--vocab_size",
    "320",
    "--d_model",
    "32",
    "--d_ff",
    "32",
    "--num_heads",
    "2",
    "--num_layers",
    "1",
    "--num_decoder_layers",
    "1",
]
TRAIN = ["--num_epoch", "3", "--batch_size", "8", "--max_source_length", "24", "--max_target_length", "8"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with data.csv (60 documents) and a T5 in t5/."""
    folder = tmp_path_factory.mktemp("finetune")
    rows = [f"{a} {b}: the {b} of {a} is {a} {b},Return {b} of {a}" for a in WORDS for b in WORDS[:5]]
    (folder / "data.csv").write_text("\n".join(["abstract,title", *rows]) + "\n")
    create("--data_file", "data.csv", "--save_dir", "t5", "--copy_init", *SIZE, cwd=folder)
    return folder


def create(*args, cwd):
    made = launch.run("SimCLS/create_model.py", *args, cwd=cwd)
    assert made.code == 0, made.err


def arguments_of(save_dir):
    return ["--pt_model", "t5", "--data_file", "data.csv", "--save_dir", save_dir, *TRAIN]


def weights(folder):
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_models_load_as_generator_and_as_encoders(workplace):
    create("--arch", "bert", "--data_file", "data.csv", "--save_dir", "bert", *SIZE, cwd=workplace)
    assert transformers.AutoModelForSeq2SeqLM.from_pretrained(workplace / "t5").config.d_model == 32
    assert {path.stat().st_mode for path in (workplace / "t5").iterdir()} == {(workplace / "data.csv").stat().st_mode}
    for name, last in (("t5", "</s>"), ("bert", "[SEP]")):
        encoder = transformers.AutoModelForTextEncoding.from_pretrained(workplace / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(workplace / name)
        batch = tokenizer(["Alpha, beta.", "gamma"], padding=True, return_tensors="pt")
        assert encoder(**batch).last_hidden_state.shape == (2, batch["input_ids"].shape[1], 32)
        assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[-1] == last
        assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "alpha, beta."


def test_copy_init_continues_what_the_decoder_reads(tmp_path, workplace):
    size = [
        "--vocab_size",
        "320",
        "--d_model",
        "256",
        "--d_ff",
        "64",
        "--num_heads",
        "4",
        "--num_layers",
        "1",
        "--num_decoder_layers",
        "1",
    ]
    accuracies = []
    for flag in ("True", "False"):
        create("--data_file", "data.csv", "--save_dir", tmp_path / flag, "--copy_init", flag, *size, cwd=workplace)
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / flag).eval()
        tokens = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:20][None] + 10
        with torch.no_grad():
            logits = model(input_ids=tokens, labels=tokens).logits
        # From the second token on: a token's successor can be found once the token has been read.
        accuracies.append((logits.argmax(-1) == tokens)[0, 1:].float().mean().item())
    assert accuracies[0] > 0.6 > 0.2 > accuracies[1]


def test_lead_and_dropout_are_as_asked(workplace):
    from finetune_model import with_lead

    from search.generator import load_generator
    from texts.documents import Document

    assert with_lead(Document("one two  three four", "short"), 3) == Document("one two  three four", "one two three")
    for dropout, expected in ((None, 0.1), (0.0, 0.0), (0.25, 0.25)):
        model, _ = load_generator(workplace / "t5", dropout=dropout)
        assert model.config.dropout_rate == expected
        assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {expected}


def test_validation_is_scored_as_the_samples_are(workplace):
    from texts.candidate_files import Lines
    from texts.samples import score_sample
    from texts.sentences import SentenceSplitter, ptb_tokenize
    from training.generator_trainer import Rouge

    tokenizer = transformers.AutoTokenizer.from_pretrained(workplace / "t5")
    split = SentenceSplitter(["One is here. Two are there."]).split
    references = ["Alpha beta. It's the beta of gamma.", "Delta. Kappa (mu) iota."]
    summaries = ["beta of gamma. Alpha.", "It's kappa iota. Delta. mu"]
    predictions = tokenizer(summaries, padding=True, return_tensors="np")["input_ids"]
    predictions[predictions == tokenizer.pad_token_id] = -100
    means = Rouge(tokenizer, references, split)(SimpleNamespace(predictions=predictions))
    scores = []
    for reference, tokens in zip(references, predictions, strict=True):
        lines = Lines("", reference, [tokenizer.decode(tokens[tokens >= 0], skip_special_tokens=True)])
        tokenized = Lines("", ptb_tokenize(reference), [ptb_tokenize(lines.candidates[0])])
        scores.append(score_sample(lines, tokenized, split)[0]["candidates"][0][1])
    assert means["rouge"] == pytest.approx(sum(scores) / 2)
    assert means["rouge1"] > means["rouge2"] > 0


def test_figures_that_json_has_no_word_for_are_none():
    from finetune_model import plain_figures

    figures = {"loss": 1.5, "grad_norm": float("inf"), "eval_loss": float("nan"), "step": 3}
    assert plain_figures(figures) == {"loss": 1.5, "grad_norm": None, "eval_loss": None, "step": 3}


def test_training_that_diverges_is_one_line_and_keeps_its_state(workplace):
    ended = launch.run(FINETUNE, *arguments_of("diverged"), "--lr", 1e30, "--num_epoch", 1, cwd=workplace)
    assert ended.code == 2, ended.err
    assert len(ended.err.splitlines()) == 1, ended.err
    assert "training has diverged: the validation loss is nan" in ended.err
    assert list((workplace / "diverged" / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    assert not (workplace / "diverged" / "finetune.json").exists()


def test_order_of_an_epoch_follows_from_its_number_alone():
    from training.generator_trainer import EpochSampler

    orders = []
    for seed, epoch in ((7, 0), (7, 1), (7, 1), (8, 0)):
        torch.rand(epoch + 3)  # Whatever the global generator has given before.
        sampler = EpochSampler(4, [5] * 40, seed=seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[1] == orders[2] != orders[0]
    assert orders[3] not in orders[:3]  # Seeds share no order.
    assert sorted(orders[0]) == list(range(40))


def test_phases_of_the_trainer_are_nvtx_ranges_as_the_other_scripts_have_them(monkeypatch):
    from training import generator_trainer

    opened, depth = [], 0

    @contextlib.contextmanager
    def nvtx_range(name):
        nonlocal depth
        opened.append(f"{depth} {name}")
        depth += 1
        yield
        depth -= 1

    monkeypatch.setattr(generator_trainer, "nvtx_range", nvtx_range)
    phases, model, state = generator_trainer.NvtxPhases(), torch.nn.Linear(1, 1), SimpleNamespace(global_step=0)
    control = SimpleNamespace(should_training_stop=False)
    call = {"args": None, "state": state, "control": control, "model": model, "train_dataloader": range(2)}
    phases.on_train_begin(**call)
    for epoch in range(3):
        phases.on_epoch_begin(**call)
        for _ in range(2 if epoch < 2 else 1):
            phases.on_step_begin(**call)
            model.train()(torch.ones(1)).backward()
            phases.on_pre_optimizer_step(**call)
            phases.on_optimizer_step(**call)
            state.global_step += 1
            control.should_training_stop = state.global_step == 5  # As of --max_steps 5, in the middle of an epoch.
            phases.on_step_end(**call)
        phases.on_epoch_end(**call)
        assert depth == 1, epoch
        model.eval()(torch.ones(1))  # Validation is no training step.
    phases.on_train_end(**call)
    step = ["3 data load", "3 forward", "3 backward", "3 optimizer", "3 zero grad"]
    assert opened[:13] == [
        "0 training generator",
        "1 epoch 1",
        "2 epoch 1 - step 1",
        *step,
        "2 epoch 1 - step 2",
        *step[:4],
    ]
    steps = ["1 - step 1", "1 - step 2", "2 - step 1", "2 - step 2", "3 - step 1"]
    assert [name for name in opened if "step" in name] == [f"2 epoch {step}" for step in steps]
    assert depth == 0


@pytest.mark.parametrize(("visible", "device", "left"), [
    (None, None, "0"), ("2,3", None, "2"), ("2,3", "cuda:1", "3"), (None, "cuda:1", "1"), ("2,3", "cpu", "2,3"),
    ("2,3", "cuda:2", "2,3"),
])  # fmt: skip
def test_the_trainer_sees_one_gpu(visible, device, left, monkeypatch):
    from finetune_model import show_only_one_gpu

    def too_early(*_):
        raise AssertionError("CUDA has read its variable by now")

    monkeypatch.setattr("os.environ", {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name in ("is_available", "init", "get_device_capability"):
        monkeypatch.setattr(f"torch.cuda.{name}", too_early)
    args = SimpleNamespace(device=device)
    show_only_one_gpu(args)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
    assert args.device == ("cuda" if left != visible else device)  # Which counts from the one that is left.


def test_of_two_epochs_with_the_same_rouge_the_lower_loss_is_the_better():
    from training.generator_trainer import Trainer

    trainer = object.__new__(Trainer)
    trainer.args = SimpleNamespace(metric_for_best_model="rouge", greater_is_better=True, save_strategy="epoch")
    trainer.state = transformers.TrainerState()
    best = []
    for step, (rouge, loss) in enumerate([(0.0, 5.0), (0.0, 4.0), (0.0, 4.5), (0.1, 9.0), (0.0, 1.0)], 1):
        trainer.state.global_step = step
        metrics = {"eval_rouge": rouge, "eval_loss": loss}
        trainer.state.log_history.append({"step": step, **metrics})
        trainer._determine_best_metric(metrics, None)
        best.append(trainer.state.best_global_step)
    assert best == [1, 2, 2, 4, 4]


@pytest.fixture(scope="module")
def tuned(workplace, run_script):
    """What a run into tuned/ has said on stderr."""
    return run_script(FINETUNE, *arguments_of("tuned"), cwd=workplace).stderr


def test_training_keeps_the_best_model_and_a_record(workplace, tuned):
    assert tuned == ""
    record = json.loads((workplace / "tuned" / "finetune.json").read_text())
    epochs = [entry for entry in record["history"] if "eval_rouge" in entry]
    assert len(epochs) == 3
    assert record["best_rouge"] == max(entry["eval_rouge"] for entry in epochs)
    assert epochs[-1]["eval_loss"] < epochs[0]["eval_loss"]
    assert record["arguments"]["batch_size"] == 8
    assert record["machine"]["versions"]["torch"]
    assert not (workplace / "tuned" / "checkpoints").exists()
    assert transformers.AutoTokenizer.from_pretrained(workplace / "tuned").model_max_length == 24
    assert weights(workplace / "tuned")["shared.weight"].isfinite().all()


def test_a_finished_generator_is_not_replaced_unasked(workplace, tuned):
    before = (workplace / "tuned/model.safetensors").read_bytes()
    for more, line in (
        ([], "finetune.json is a finished run; --restart runs it again"),
        (
            ["--lr", 0.1],
            "is from a run with --lr 0.0003 (now 0.1); choose another --save_dir, or --restart to replace it",
        ),
        (["--lr", 0.1, "--resume"], "is from a run with --lr 0.0003 (now 0.1)"),
        (["--data_file", "other.csv", "--resume"], "--documents_digest "),
    ):
        (workplace / "other.csv").write_text((workplace / "data.csv").read_text() + "one more,more\n")
        ended = launch.run(FINETUNE, *arguments_of("tuned"), *more, cwd=workplace)
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
        assert line in ended.err
    finished = launch.run(FINETUNE, *arguments_of("tuned"), "--resume", cwd=workplace)
    assert (finished.code, finished.out) == (0, "tuned/finetune.json is finished; nothing to resume\n")
    assert (workplace / "tuned/model.safetensors").read_bytes() == before
    assert not (workplace / "tuned/checkpoints").exists()
    (workplace / "tuned/model.safetensors").rename(workplace / "aside")
    ended = launch.run(FINETUNE, *arguments_of("tuned"), "--resume", cwd=workplace)
    (workplace / "aside").rename(workplace / "tuned/model.safetensors")
    assert (ended.code, "is finished, but tuned/model.safetensors is gone" in ended.err) == (2, True), ended.err
