"""BART (https://arxiv.org/abs/1910.13461) and its relatives mBART, PEGASUS and Marian for beam search, run directly on
the weights."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from search.direct_decoder import CrossAttention, DirectDecoder, FeedForward, SelfAttention
from search.products import product

# Whether a sublayer normalises its input, or the sum of that and its result.
NORM_FIRST = {"bart": False, "marian": False, "mbart": True, "pegasus": True}


class BartDecoder(DirectDecoder):
    @staticmethod
    def supports(model):
        """True for the kinds above."""
        config = model.config
        return config.model_type in NORM_FIRST and config.encoder_attention_heads == config.decoder_attention_heads

    def __init__(self, model):
        config, encoder, decoder = model.config, model.get_encoder(), model.get_decoder()
        self.norm_first = NORM_FIRST[config.model_type]
        self.weight = model.lm_head.weight
        self.heads, self.head_size = config.decoder_attention_heads, config.d_model // config.decoder_attention_heads
        scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.document_embedding, self.beam_embedding = Embedding(encoder, scale), Embedding(decoder, scale)
        self.encoder_layers = [_read_layer(layer, config.activation_function) for layer in encoder.layers]
        self.decoder_layers = [_read_layer(layer, config.activation_function) for layer in decoder.layers]
        # Only the kinds that normalise first have these.
        self.encoder_norm = getattr(encoder, "layer_norm", nn.Identity())
        self.decoder_norm = getattr(decoder, "layer_norm", nn.Identity())
        self.to_vocabulary = product(self.weight, biases=[model.final_logits_bias[0].to(self.weight.dtype)])

    def _embed_documents(self, tokens, lengths):
        positions = torch.cat([torch.arange(length) for length in lengths])
        return self.document_embedding(tokens, positions.to(tokens.device))

    def _embed_next(self, tokens):
        return self.beam_embedding(tokens, self.length)

    def _limit(self, hidden):
        """As the library does, so that an encoder that overflows in float16 gives large numbers, but numbers."""
        if hidden.dtype != torch.float16:
            return hidden
        most = torch.finfo(torch.float16).max - 1000
        return hidden.clamp(-most, most)

    def _encoder_bias(self, length):
        return None

    def _decoder_bias(self, length):
        return self.weight.new_zeros(1, length, length)


class Embedding:
    """The sum of the embeddings of tokens and of their positions, normalised where the model does.

    part: the model's encoder or decoder. scale: of the tokens' embeddings. A call takes tokens, int64 [tokens], and
    positions, the same or an int.
    """

    def __init__(self, part, scale):
        # Not by calling embed_tokens, which scales by itself in some kinds.
        self.tokens, self.scale = part.embed_tokens.weight, scale
        # Learned tables begin with rows that no position uses.
        self.positions = part.embed_positions.weight[getattr(part.embed_positions, "offset", 0) :]
        self.norm = getattr(part, "layernorm_embedding", nn.Identity())

    def __call__(self, tokens, positions):
        return self.norm(F.embedding(tokens, self.tokens) * self.scale + self.positions[positions])


def _read_layer(layer, activation):
    """The sublayers of an encoder layer (two) or decoder layer (three), in order. activation: a name of ACT2FN."""
    own = layer.self_attn
    sublayers = [
        SelfAttention(
            layer.self_attn_layer_norm, _linear(_scaled_query(own), own.k_proj, own.v_proj), _linear(own.out_proj)
        )
    ]
    if hasattr(layer, "encoder_attn"):
        cross = layer.encoder_attn
        key_value = _linear(cross.k_proj, cross.v_proj)
        norm = layer.encoder_attn_layer_norm
        sublayers.append(CrossAttention(norm, _linear(_scaled_query(cross)), key_value, _linear(cross.out_proj)))
    inner = _linear(layer.fc1, activation=activation)
    return [*sublayers, FeedForward(layer.final_layer_norm, inner, _linear(layer.fc2))]


class Linear(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


def _scaled_query(attention):
    """The projection of an attention's queries, with the scale of their products with keys."""
    query, scale = attention.q_proj, attention.scaling
    return Linear(query.weight * scale, query.bias * scale)


def _linear(*linears, activation=None):
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    return product(*weights, biases=biases, activation=activation)
