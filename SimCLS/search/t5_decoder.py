"""T5 and mT5 for beam search (https://arxiv.org/abs/1910.10683), run directly on the weights."""

import functools

import torch
import torch.nn.functional as F

from search.direct_decoder import CrossAttention, DirectDecoder, FeedForward, SelfAttention
from search.products import gated_product, product


class T5Decoder(DirectDecoder):
    norm_first = True

    @staticmethod
    def supports(model):
        """True for T5 and mT5 in float32 or bfloat16. In float16, T5 needs the library's guards against overflow."""
        return model.config.model_type in ("t5", "mt5") and model.dtype in (torch.float32, torch.bfloat16)

    def __init__(self, model):
        config, encoder, decoder = model.config, model.get_encoder(), model.get_decoder()
        self.heads, self.head_size = config.num_heads, config.d_kv
        self.weight = model.get_input_embeddings().weight
        self.encoder_attention = encoder.block[0].layer[0].SelfAttention
        self.decoder_attention = decoder.block[0].layer[0].SelfAttention
        self.encoder_layers = [_read_layer(block, config.dense_act_fn) for block in encoder.block]
        self.decoder_layers = [_read_layer(block, config.dense_act_fn) for block in decoder.block]
        self.encoder_norm = _read_norm(encoder.final_layer_norm)
        # mT5's config lacks this setting; mT5 never scales.
        scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
        norm, multiply = _read_norm(decoder.final_layer_norm), product(model.lm_head.weight)
        self.decoder_norm, self.to_vocabulary = norm, lambda hidden: multiply(hidden * scale)

    def _embed_documents(self, tokens, lengths):
        return F.embedding(tokens, self.weight)

    def _embed_next(self, tokens):
        return F.embedding(tokens, self.weight)

    def _encoder_bias(self, length):
        return self.encoder_attention.compute_bias(length, length)

    def _decoder_bias(self, length):
        return self.decoder_attention.compute_bias(length, length)[0]


def _read_layer(block, activation):
    """The sublayers of an encoder block (two) or decoder block (three), in order. activation: a name of ACT2FN."""
    own, *cross, dense = block.layer
    attention = own.SelfAttention
    query_key_value = product(attention.q.weight, attention.k.weight, attention.v.weight)
    layer = [SelfAttention(_read_norm(own.layer_norm), query_key_value, product(attention.o.weight))]
    for sublayer in cross:
        attention = sublayer.EncDecAttention
        query, key_value = product(attention.q.weight), product(attention.k.weight, attention.v.weight)
        layer.append(CrossAttention(_read_norm(sublayer.layer_norm), query, key_value, product(attention.o.weight)))
    inner = dense.DenseReluDense
    if hasattr(inner, "wi_0"):
        read_inner = gated_product(inner.wi_0.weight, inner.wi_1.weight, activation)
    else:
        read_inner = product(inner.wi.weight, activation=activation)
    layer.append(FeedForward(_read_norm(dense.layer_norm), read_inner, product(inner.wo.weight)))
    return layer


def _read_norm(norm):
    return functools.partial(
        F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon
    )
