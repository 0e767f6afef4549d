"""Tiny encoder-decoders that every version of transformers builds alike, and what the beam search tests ask of them.

The weights are drawn by name from numpy's RandomState, whose numbers are the same in every version, and not by the
library's own initialisation.
"""

import hashlib

import numpy as np
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, END = 0, 1
T5 = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_heads": 4,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
}
# What the published checkpoints have in their generation config.
FORCED_TOKENS = {
    "bart": {"forced_bos_token_id": 0, "forced_eos_token_id": 2},
    "pegasus": {"forced_bos_token_id": None, "forced_eos_token_id": 1},
}
# name: (class, configuration, scale of the weights, seed); scale and seed are such that candidates end at all lengths.
MODELS = {
    "t5": (T5ForConditionalGeneration, T5Config(vocab_size=41, **T5), 0.8, 19),
    "t5_wide": (T5ForConditionalGeneration, T5Config(vocab_size=2900, **T5), 0.45, 21),
    "t5_gated": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=41, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5),
        0.6,
        0,
    ),
    "mt5": (MT5ForConditionalGeneration, MT5Config(vocab_size=41, **T5), 0.8, 0),
    "bart": (BartForConditionalGeneration, BartConfig(vocab_size=41, **BART), 0.3, 12),
    "pegasus": (PegasusForConditionalGeneration, PegasusConfig(vocab_size=41, **BART), 0.45, 10),
    "mbart": (
        MBartForConditionalGeneration,
        MBartConfig(vocab_size=41, decoder_start_token_id=2, scale_embedding=True, activation_function="relu", **BART),
        0.45,
        2,
    ),
    "marian": (
        MarianMTModel,
        MarianConfig(
            vocab_size=41,
            pad_token_id=PAD,
            eos_token_id=END,
            forced_eos_token_id=END,
            decoder_start_token_id=PAD,
            scale_embedding=True,
            activation_function="swish",
            **BART,
        ),
        0.15,
        4,
    ),
}


def build(name):
    """The model `name`, float32, in eval mode."""
    kind, config, scale, seed = MODELS[name]
    model = kind(config).eval()
    with torch.no_grad():
        for key, parameter in _parameters(model):
            name_seed = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "little")
            values = np.random.RandomState(name_seed).standard_normal(tuple(parameter.shape)) * scale
            parameter.copy_(torch.from_numpy(values) + ("norm" in key and key.endswith("weight")))
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[config.eos_token_id] *= 2
        output.copy_(embedding)
    for key, token in FORCED_TOKENS.get(name, {}).items():
        setattr(model.generation_config, key, token)
    return model


def build_switch(vocab_size=41):
    """A mixture of experts with the library's random weights, in eval mode."""
    layers = {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = SwitchTransformersConfig(**T5, **layers, vocab_size=vocab_size, num_experts=2)
    return SwitchTransformersForConditionalGeneration(config).eval()


def _parameters(model):
    # transformers 5 ties the output to the input embeddings of every T5, and 4 does not: `build` makes them equal.
    return [(key, parameter) for key, parameter in model.named_parameters() if key != "lm_head.weight"]


def fingerprint(model):
    """A digest of the parameters' names and values."""
    digest = hashlib.sha256()
    for key, parameter in sorted(_parameters(model)):
        digest.update(key.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def documents(model):
    """Four documents of 3 to 11 tokens: input_ids and attention_mask, int64 [4, 11]."""
    config = model.config
    draws = np.random.RandomState(0)
    input_ids = torch.full((4, 11), config.pad_token_id)
    for row, length in enumerate((11, 7, 3, 9)):
        input_ids[row, : length - 1] = torch.from_numpy(draws.randint(3, config.vocab_size, length - 1))
        input_ids[row, length - 1] = config.eos_token_id
    lengths = torch.tensor((11, 7, 3, 9)).unsqueeze(1)
    return input_ids, (torch.arange(11) < lengths).long()
