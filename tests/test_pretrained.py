"""What a stage asks of a model before it works with it: lengths, the first token of a text and of a summary."""

import contextlib
import json
import os
import shutil
import sys
from types import SimpleNamespace

import finetune_model
import pytest
import tiny_inputs
import tiny_seq2seq
import torch
import transformers
from data_utils import TextEncoding
from main import load_model
from model import load_encoder, load_scorer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, GenerationConfig

from harness.distributed import World
from harness.endings import UserError
from pretrained.model_folders import check_apart, most_tokens, refuse_to_replace
from scorer.scorer_arguments import get_args_parser
from search.generator import CandidateGenerator, check_generation, load_generator, own_length, search_settings
from search.token_rules import check_end, check_settings, check_start, check_target_vocabulary

SMALL_BERT = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
SMALL_BERT |= {"num_hidden_layers": 1, "max_position_embeddings": 48, "pad_token_id": 0}
MBART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
MBART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 41}


def bert2bert(**ids):
    parts = BertConfig(**SMALL_BERT), BertConfig(**SMALL_BERT | {"max_position_embeddings": 24})
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts, **ids)
    return EncoderDecoderModel(config).eval()


# ------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(("kind", "positions"), [("t5", sys.maxsize), ("bert", 64), ("roberta", 62)])
def test_an_encoder_has_so_many_positions(encoders, kind, positions):
    assert most_tokens(load_encoder(encoders[kind])[0]) == positions


def test_generators_have_so_many_positions_wherever_they_keep_them():
    led = transformers.LEDForConditionalGeneration(
        transformers.LEDConfig(**MBART, max_encoder_position_embeddings=96, max_decoder_position_embeddings=40,
                               attention_window=8)
    )  # fmt: skip
    prophet = transformers.ProphetNetForConditionalGeneration(
        transformers.ProphetNetConfig(
            vocab_size=41, hidden_size=16, num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=2,
            num_decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=20,
        )
    )  # fmt: skip
    models = {name: tiny_seq2seq.build(name) for name in ("t5", "bart", "pegasus")} | {"bert2bert": bert2bert()}
    models["prophet"] = prophet
    found = {
        name: (most_tokens(model.get_encoder()), most_tokens(model.get_decoder()))
        for name, model in (models | {"led": led}).items()
    }
    assert found == {"t5": (sys.maxsize,) * 2, "bart": (64, 64), "pegasus": (64, 64), "bert2bert": (48, 24),
                     "led": (96, 40), "prophet": (19, 18)}  # fmt: skip
    prophet(input_ids=torch.ones(1, 19, dtype=torch.long), decoder_input_ids=torch.ones(1, 18, dtype=torch.long))


def test_spare_rows_of_a_table_are_no_positions():
    assert most_tokens(transformers.NystromformerModel(transformers.NystromformerConfig(**SMALL_BERT))) == 48


def test_lengths_that_are_asked_for_are_obeyed_recorded_or_refused(tmp_path):
    folder = tiny_inputs.make_model(tmp_path / "t5", "t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 64  # As fine-tuning leaves it: where documents were cut, and no limit of the model.
    tokenizer.save_pretrained(folder)
    _, encoding, description = load_scorer(folder)
    assert (encoding.total_len, encoding.max_len) == (64, 64)
    _, encoding, description = load_scorer(folder, total_len=96)
    assert (
        len(encoding.documents(["alpha beta gamma " * 99])[0]) == encoding.total_len == description["total_len"] == 96
    )
    args = get_args_parser("").parse_args(["--model_type", str(folder), "--max_len", "80"])
    load_model(args, World(0, 1, torch.device("cpu")))
    assert (args.total_len, args.max_len) == (64, 80)


@pytest.mark.parametrize(("kind", "limit"), [("bert", 64), ("roberta", 62)])
@pytest.mark.parametrize("name", ["total_len", "max_len"])
def test_more_tokens_than_an_encoder_has_positions_are_refused(encoders, kind, limit, name):
    assert load_scorer(encoders[kind])[1].total_len == limit
    load_scorer(encoders[kind], **{name: limit})
    with pytest.raises(UserError, match=f"--{name} {limit + 1} is more than the {limit} positions of this model"):
        load_scorer(encoders[kind], **{name: limit + 1})


@pytest.mark.parametrize(
    ("config", "length"),
    [({"max_length": 20}, 20), ({"max_length": 33}, 33), ({"max_new_tokens": 9, "max_length": 33}, 10), ({}, 64),
     ({"max_length": 10**9}, 64), ({"max_new_tokens": 10**9}, 64)],
)  # fmt: skip
def test_a_generator_ends_summaries_where_its_generation_config_says(config, length):
    assert own_length(GenerationConfig(**config)) == length


def test_a_generator_that_was_tuned_to_20_tokens_generates_no_more(tmp_path, encoders):
    args = finetune_model.get_args_parser().parse_args(
        ["--pt_model", "x", "--save_dir", "y", "--max_target_length", "20", "--max_source_length", "30"]
    )
    model, tokenizer = finetune_model.load_generator(encoders["t5"])
    model.generation_config.max_new_tokens = 50
    finetune_model.set_lengths(args, model, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = finetune_model.load_generator(tmp_path)
    arguments = SimpleNamespace(num_cands=2, num_groups=2, diversity_penalty=1.0, decoder_max_len=None)
    settings = search_settings(arguments, model.generation_config)
    assert settings["max_length"] == 20
    assert CandidateGenerator(model, tokenizer, settings).max_source_length == 30


@pytest.mark.parametrize(("asked", "most"), [({"min_length": 50}, 4), ({}, 4), ({"min_length": 11}, None)])
def test_summaries_of_more_tokens_than_are_allowed_are_refused(asked, most):
    model, tokenizer = tiny_seq2seq.build("t5"), SimpleNamespace(model_max_length=30)
    model.generation_config.min_length, model.generation_config.max_length = 5, 10
    for search in ("beam", "sample", "beam+sample"):
        args = SimpleNamespace(num_cands=2, diversity_penalty=1.0, top_p=0.9, seed=0, decoder_max_len=most, **asked)
        with pytest.raises(UserError, match=r"a min_length of \d+ tokens is above the max_length of (4|10); set --min"):
            search_settings(args, model.generation_config, search)
    with pytest.raises(UserError, match="a min_length of 5 tokens is above the max_length of 4; set --max_target"):
        finetune_model.set_lengths(SimpleNamespace(max_source_length=30, max_target_length=4), model, tokenizer)
    finetune_model.set_lengths(SimpleNamespace(max_source_length=30, max_target_length=5), model, tokenizer)
    args = SimpleNamespace(num_cands=2, num_groups=1, diversity_penalty=1.0, decoder_max_len=None)
    assert search_settings(args, model.generation_config)["min_length"] == 5


def test_a_sentencepiece_model_alone_names_the_package_that_reads_it(tmp_path, monkeypatch):
    tiny_inputs.make_model(tmp_path / "t5", "t5")
    for path in (tmp_path / "t5").glob("tokenizer*"):
        path.unlink()
    (tmp_path / "t5" / "spiece.model").write_bytes(b"no model")
    with pytest.raises(UserError) as installed:
        load_encoder(str(tmp_path / "t5"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # As where it is not installed.
    with pytest.raises(UserError, match="its tokenizer needs the package sentencepiece.*pip install sentencepiece"):
        load_encoder(str(tmp_path / "t5"))
    assert "pip install sentencepiece" not in str(installed.value)


# ------------------------------------------------------------------------------------------------ what comes first


@pytest.mark.parametrize(
    ("special", "template", "first", "added"),
    [
        ({"cls_token": "<s>", "sep_token": "</s>"}, "<s> $A </s>", "<s>", 0),
        ({"cls_token": "<s>", "sep_token": "</s>"}, "$A </s> <s>", "<s>", 1),  # As XLNet has it.
        ({"bos_token": "<s>", "eos_token": "</s>"}, "$A </s>", "<s>", 1),
        ({"bos_token": "<s>", "eos_token": "</s>"}, "<s> $A", "<s>", 0),
        ({"eos_token": "</s>"}, "$A </s>", "</s>", 1),
        ({"eos_token": "</s>"}, "$A", "</s>", 1),
    ],
)
def test_the_first_token_of_a_text_is_no_word(special, template, first, added):
    tokenizer = tiny_inputs.make_tokenizer("roberta")
    backend = tokenizer._tokenizer
    backend.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **special)
    plain = tokenizer("alpha beta")["input_ids"]
    (ids,) = TextEncoding(tokenizer, 40, 40).documents(["alpha beta"])
    assert tokenizer.convert_ids_to_tokens(ids[0]) == first
    assert ids[added:] == plain


def mbart(**ids):
    return transformers.MBartForConditionalGeneration(transformers.MBartConfig(**MBART, **ids))


def with_start(model, tokens):
    model.generation_config.decoder_start_token_id = tokens
    return model


def target_tokens(text_target):
    """As mBART's tokenizer has them: the end token, and the language, with which summaries are to start."""
    return {"input_ids": [5, 6, 2, 7]}


def test_tokens_beyond_the_embeddings_are_refused(encoders, tmp_path):
    """Even if there are few enough of them."""
    folder = shutil.copytree(encoders["t5"], tmp_path / "t5")
    load_generator(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    word = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"][word] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="its tokenizer has 5001 tokens, more than the"):
        load_generator(folder)


def test_a_decoder_with_fewer_tokens_than_the_tokenizer_is_refused():
    sizes = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 30, "pad_token_id": 0}
    config = transformers.MarianConfig(
        vocab_size=41, eos_token_id=1, decoder_start_token_id=0, **sizes, **tiny_seq2seq.BART
    )
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 40})
    with pytest.raises(ValueError, match="its tokenizer has 41 tokens, but its decoder only 30"):
        check_target_vocabulary(transformers.MarianMTModel(config), tokenizer)
    check_target_vocabulary(tiny_seq2seq.build("bart"), tokenizer)
    tokenizer.separate_vocabs = True
    check_target_vocabulary(transformers.MarianMTModel(config), tokenizer)


def test_the_attention_of_bigbird_does_not_depend_on_what_came_before(tmp_path):
    config = transformers.BigBirdPegasusConfig(vocab_size=400, block_size=2, **tiny_seq2seq.BART)
    transformers.BigBirdPegasusForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_inputs.make_tokenizer("t5").save_pretrained(tmp_path)
    assert load_generator(tmp_path)[0].get_encoder().attention_type == "original_full"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_seq2seq.build("t5"), None),
        (lambda: tiny_seq2seq.build("bart"), None),
        (lambda: tiny_seq2seq.build("pegasus"), None),
        (tiny_seq2seq.build_switch, None),
        (lambda: mbart(decoder_start_token_id=7), None),
        (lambda: with_start(mbart(decoder_start_token_id=7), [7]), None),
        (lambda: bert2bert(decoder_start_token_id=5, pad_token_id=0), None),
        (lambda: with_start(tiny_seq2seq.build("t5"), 41), "has the token 41, but the model's are 0 to 40"),
        (lambda: with_start(tiny_seq2seq.build("t5"), "0"), "has the token '0'"),
        (mbart, "summaries start with token 7 in training and with 0 in generation"),
        (lambda: with_start(mbart(), [7, 8]), "it must be one token"),
        (lambda: mbart(decoder_start_token_id=9), "start with token 7 in training and with 9 in generation"),
        (bert2bert, "decoder_start_token_id"),
        (lambda: bert2bert(decoder_start_token_id=5), "pad_token_id"),
    ],
)
def test_summaries_start_alike_in_training_and_generation_or_are_refused(model, reason):
    model = model()
    if reason is None:
        check_start(model, target_tokens)
        assert isinstance(model.generation_config.decoder_start_token_id, int)
    else:
        with pytest.raises(ValueError, match=reason):
            check_start(model, target_tokens)


def test_a_suppressed_end_and_padding_that_is_text_are_refused():
    model, tokenizer = tiny_seq2seq.build("t5"), tiny_inputs.make_tokenizer("t5")
    model.generation_config.eos_token_id = 1
    check_end(model, tokenizer)
    model.generation_config.suppress_tokens = [1]
    with pytest.raises(ValueError, match="end with token 1 in training and with none in generation"):
        check_end(model, tokenizer)
    model.generation_config.suppress_tokens, model.generation_config.pad_token_id = None, 5
    with pytest.raises(ValueError, match="padded with token 5, which is text to the tokenizer; set pad_token_id"):
        check_end(model, tokenizer)


@pytest.mark.parametrize(
    ("ends", "template", "reason"),
    [
        (1, "$A </s>", None),
        ([7, 1], "$A </s>", None),
        (1, "$A </s> <unk>", None),  # As mBART's, where the language comes last.
        (5, "$A", None),
        (5, "$A </s>", r"summaries end with token 1 in training and with \[5\] in generation; set eos_token_id"),
        (None, "$A </s>", "end with token 1 in training and with none in generation"),
    ],
)
def test_summaries_end_alike_in_training_and_generation_or_are_refused(ends, template, reason):
    model, tokenizer = tiny_seq2seq.build("t5"), tiny_inputs.make_tokenizer("t5")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("</s>", 1), ("<unk>", 2)]
    )
    model.generation_config.eos_token_id = ends
    with contextlib.nullcontext() if reason is None else pytest.raises(ValueError, match=reason):
        check_end(model, tokenizer)


def test_a_tokenizer_of_many_languages_without_a_target_is_refused():
    with pytest.raises(ValueError, match="has no target language"):
        check_start(tiny_seq2seq.build("bart"), SimpleNamespace(tgt_lang=None))
    target_tokens.tgt_lang = "de"
    check_start(tiny_seq2seq.build("bart"), target_tokens)
    del target_tokens.tgt_lang


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("max_length", [None, 2], [0, 12.5, "20"]),
        ("min_length", [0, 3], [-1, "3"]),
        ("no_repeat_ngram_size", [0, 2], [-1, "2", 2.0]),
        ("length_penalty", [0, -1.5], ["2", float("nan")]),
        ("eos_token_id", [1, [1, 2]], [1.0, "1", [[1]], True]),
        ("forced_bos_token_id", [3, [3]], [3.0, "x"]),
        ("suppress_tokens", [None, [], [5]], [[5.0], 5]),
        ("bad_words_ids", [None, [[5]]], [[5], [["5"]]]),
    ],
)
def test_a_setting_that_is_not_what_it_has_to_be_names_itself(name, good, bad):
    for value in good:
        check_settings(SimpleNamespace(**{name: value}))
    for value in bad:
        with pytest.raises(ValueError, match=rf"in its generation_config.json {name}[\d.]* is n"):
            check_settings(SimpleNamespace(**{name: value}))


# ---------------------------------------------------------------------------------------- before training, not after


@pytest.mark.parametrize(
    "settings",
    [{"length_penalty": 2.0}, {"early_stopping": True}, {"temperature": 0.5}, {"force_words_ids": [[5]]},
     {"num_beam_groups": 2, "num_beams": 4, "diversity_penalty": 1.0}],
    ids=str,
)  # fmt: skip
def test_a_generation_config_that_will_fail_is_refused_before_training(settings, encoders):
    model, tokenizer = finetune_model.load_generator(encoders["t5"])
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(UserError, match="validation cannot generate with its generation config, or cannot save it"):
        check_generation("mine", model, tokenizer, settings.get("num_beams", 1))


def test_a_generation_config_of_many_sequences_validates_by_one(encoders):
    model, tokenizer = finetune_model.load_generator(encoders["t5"])
    model.generation_config.num_beams = model.generation_config.num_return_sequences = 4
    check_generation("mine", model, tokenizer, 1)
    assert model.generation_config.num_return_sequences == 4


def test_a_place_that_tokenizers_cannot_write_to_is_refused_before_training(tmp_path):
    odd = tmp_path / os.fsdecode(b"o\xff") / "model"
    for check in (lambda: check_apart(odd, tmp_path), lambda: refuse_to_replace(odd)):
        with pytest.raises(UserError, match="not UTF-8"):
            check()


def test_what_is_no_model_folder_says_why(encoders, tmp_path):
    with pytest.raises(UserError, match="it is a file.*; give its folder"):
        load_generator(f"{encoders['t5']}/config.json")
    shutil.copytree(encoders["t5"], tmp_path / "half")
    (tmp_path / "half" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="its tokenizer_config.json is missing"):
        load_generator(tmp_path / "half")


def test_the_form_of_what_the_librarys_search_returns_is_ours(encoders, tmp_path):
    folder = shutil.copytree(encoders["t5"], tmp_path / "generator")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict_in_generate": True}))
    assert not load_generator(folder)[0].generation_config.return_dict_in_generate


@pytest.mark.parametrize(("kind", "told"), [("Reformer", "of certain lengths"), ("SqueezeBert", "cannot encode")])
def test_encoders_that_cannot_be_used_are_refused(encoders, tmp_path, kind, told):
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 4}
    if kind == "Reformer":
        sizes = {
            "hidden_size": 16,
            "attn_layers": ["local"],
            "num_attention_heads": 2,
            "attention_head_size": 8,
            "feed_forward_size": 16,
            "axial_pos_shape": [4, 4],
            "axial_pos_embds_dim": [8, 8],
            "is_decoder": False,
        }
    config = getattr(transformers, f"{kind}Config")(vocab_size=500, **sizes)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(encoders["bert"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=told):
        load_encoder(str(tmp_path))
