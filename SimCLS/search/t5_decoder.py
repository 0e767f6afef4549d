"""T5 for beam search, run directly on the weights: the same results, without repeating the work that beams share.

In contrast to the modules of transformers, it
- encodes the documents of a batch concatenated, without padding in the matrix products;
- keeps the encoder's keys and values once per document, shared by its beams (the library keeps a copy per beam);
- writes new keys and values in place, in caches that grow by 16 positions at a time;
- computes query, key and value in one product, with weights in oneDNN's layout for the processor;
- removes the rows of ended beams.
The results equal the library's up to the rounding of sums in another order.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

# In positions. Batched products run several times faster on contiguous memory, so caches grow by whole blocks, and
# positions not reached yet are masked.
CACHE_BLOCK = 16
# Documents that are encoded together, and padded to one length for cross-attention. On a CPU few, for little padding
# and so that their activations stay in the processor's cache; on a GPU the whole batch, for few kernels.
DOCUMENTS_TOGETHER = {"cpu": 4}


class SelfAttention(NamedTuple):
    """The weights of one sublayer. A Callable multiplies [rows, in] by a weight matrix."""

    norm: torch.Tensor
    query_key_value: Callable
    output: Callable


class CrossAttention(NamedTuple):
    norm: torch.Tensor
    query: Callable
    key_value: Callable
    output: Callable


class FeedForward(NamedTuple):
    norm: torch.Tensor
    inner: Callable
    output: Callable


class T5Decoder:
    """Runs a T5 or mT5 model for a search: `encode`, `start`, then `step` repeatedly, with changes of rows in between.

    A row is one beam of one document: `start` makes one row per document, `spread` one per beam. Rows stay in the order
    of their documents. The weights are read at construction: after further training, make a new T5Decoder.
    """

    @staticmethod
    def supports(model):
        """True for T5 and mT5 in float32 or bfloat16. In float16, T5 needs the library's guards against overflow."""
        return model.config.model_type in ("t5", "mt5") and model.dtype in (torch.float32, torch.bfloat16)

    def __init__(self, model):
        config, encoder, decoder = model.config, model.get_encoder(), model.get_decoder()
        self.heads, self.head_size = config.num_heads, config.d_kv
        self.epsilon = config.layer_norm_epsilon
        self.embedding = model.get_input_embeddings().weight
        self.encoder_bias = encoder.block[0].layer[0].SelfAttention.compute_bias
        self.decoder_bias = decoder.block[0].layer[0].SelfAttention.compute_bias
        self.encoder_layers = [_read_layer(block, config.dense_act_fn) for block in encoder.block]
        self.decoder_layers = [_read_layer(block, config.dense_act_fn) for block in decoder.block]
        self.encoder_norm = encoder.final_layer_norm.weight
        self.decoder_norm = decoder.final_layer_norm.weight
        self.to_vocabulary = _product(model.lm_head.weight)
        # mT5's config lacks this setting; mT5 never scales.
        self.output_scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0

    def encode(self, input_ids, attention_mask):
        """Encode a batch of documents for `start`; the result can be used repeatedly.

        input_ids, attention_mask: int64 [documents, length], padded at the end; no document is empty.
        """
        together = DOCUMENTS_TOGETHER.get(input_ids.device.type, len(input_ids))
        parts = zip(input_ids.split(together), attention_mask.split(together), strict=True)
        return [self._remember(ids[mask.bool()], mask.sum(1).tolist()) for ids, mask in parts]

    def start(self, encoded, max_length):
        """Begin with the documents `encoded` by `encode`, and forget earlier ones.

        max_length: the most tokens of a beam, including the start token.
        """
        self.memories = [copy.copy(memory) for memory in encoded]
        documents, device = sum(memory.documents for memory in encoded), self.embedding.device
        self.length = 0
        self.keys = [self.embedding.new_zeros(documents, self.heads, 0, self.head_size) for _ in self.decoder_layers]
        self.values = list(self.keys)
        capacity = -(-max_length // CACHE_BLOCK) * CACHE_BLOCK
        future = torch.ones(capacity, capacity, dtype=torch.bool, device=device).triu(1)
        bias = self.decoder_bias(capacity, capacity)[0].masked_fill(future, float("-inf"))
        self.bias = bias.transpose(0, 1).unsqueeze(2).contiguous()  # [query, head, 1, key]

    def step(self, tokens):
        """Append a token to each row, and return the logits of the next, [rows, vocabulary]. tokens: int64 [rows]."""
        if self.length % CACHE_BLOCK == 0:
            self.keys = [F.pad(keys, (0, 0, 0, CACHE_BLOCK)) for keys in self.keys]
            self.values = [F.pad(values, (0, 0, 0, CACHE_BLOCK)) for values in self.values]
        hidden = F.embedding(tokens, self.embedding)
        for index, (self_attention, cross_attention, feed_forward) in enumerate(self.decoder_layers):
            hidden += self._attend_to_beam(hidden, self_attention, index)
            hidden += self._attend_to_document(hidden, cross_attention, index)
            hidden += self._feed_forward(hidden, feed_forward)
        self.length += 1
        return self.to_vocabulary(self._norm(hidden, self.decoder_norm) * self.output_scale)

    def spread(self, beams):
        """Repeat each document's single row `beams` times."""
        self.keys = [keys.repeat_interleave(beams, dim=0) for keys in self.keys]
        self.values = [values.repeat_interleave(beams, dim=0) for values in self.values]
        for memory in self.memories:
            memory.spread(beams)

    def reorder(self, rows):
        """Make row i continue the former row rows[i], which is of the same document. rows: int64 [rows]."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]

    def keep(self, rows):
        """Drop all rows but these. rows: int64 [rows to keep], ascending."""
        self.reorder(rows)
        start = 0
        for memory in self.memories:
            end = start + memory.rows
            memory.keep(rows[(rows >= start) & (rows < end)] - start)
            start = end
        self.memories = [memory for memory in self.memories if memory.rows]

    def _norm(self, hidden, weight):
        return F.rms_norm(hidden, weight.shape, weight, self.epsilon)

    def _encode(self, tokens, lengths):
        """Encode concatenated documents. tokens: int64 [sum of lengths]. Returns [sum of lengths, d_model]."""
        bias = self.encoder_bias(max(lengths), max(lengths))
        attend = ENCODER_ATTENTION.get(tokens.device.type, PaddedAttention)(lengths, bias)
        hidden = F.embedding(tokens, self.embedding)
        for self_attention, feed_forward in self.encoder_layers:
            heads = self_attention.query_key_value(self._norm(hidden, self_attention.norm))
            hidden += self_attention.output(attend(heads.view(-1, 3, self.heads, self.head_size)))
            hidden += self._feed_forward(hidden, feed_forward)
        return self._norm(hidden, self.encoder_norm)

    def _remember(self, tokens, lengths):
        """The Memory of concatenated documents. tokens: int64 [sum of lengths]."""
        hidden, memory = self._encode(tokens, lengths), Memory(lengths)
        for _, cross_attention, _ in self.decoder_layers:
            memory.add_layer(cross_attention.key_value(hidden).unflatten(1, (2, self.heads, self.head_size)))
        return memory

    def _attend_to_beam(self, hidden, layer, index):
        keys, values = self.keys[index], self.values[index]
        heads = layer.query_key_value(self._norm(hidden, layer.norm))
        query, key, value = heads.view(len(hidden), 3, self.heads, self.head_size).unbind(1)
        keys[:, :, self.length] = key
        values[:, :, self.length] = value
        weights = torch.matmul(query.unsqueeze(2), keys.transpose(2, 3))
        weights += self.bias[self.length, :, :, : keys.shape[2]]
        return layer.output(torch.matmul(weights.softmax(-1), values).flatten(1))

    def _attend_to_document(self, hidden, layer, index):
        query = layer.query(self._norm(hidden, layer.norm)).unflatten(1, (self.heads, self.head_size))
        parts = query.split([memory.rows for memory in self.memories])
        mixed = [memory.attend(part, index) for memory, part in zip(self.memories, parts, strict=True)]
        return layer.output(torch.cat(mixed).flatten(1))

    def _feed_forward(self, hidden, layer):
        return layer.output(layer.inner(self._norm(hidden, layer.norm)))


class SeparateAttention:
    """Self-attention within concatenated documents, one document at a time.

    lengths: list of int. bias: [1, heads, longest, longest], added to the attention logits. A call takes query, key and
    value of all tokens, [sum of lengths, 3, heads, head size], and returns [sum of lengths, heads * head size].
    """

    def __init__(self, lengths, bias):
        self.lengths, self.bias = lengths, bias

    def __call__(self, heads):
        parts = heads.unsqueeze(0).transpose(1, 3).split(self.lengths, dim=3)
        mixed = []
        for part, length in zip(parts, self.lengths, strict=True):
            mask = self.bias[:, :, :length, :length]
            mixed.append(F.scaled_dot_product_attention(*part.unbind(2), attn_mask=mask, scale=1.0))
        return torch.cat(mixed, dim=2).transpose(1, 2).flatten(2).squeeze(0)


class PaddedAttention:
    """The same for all documents at once, padded to one length: for a GPU, where many small calls take longer."""

    def __init__(self, lengths, bias):
        present = torch.arange(bias.shape[-1]) < torch.tensor(lengths).unsqueeze(1)  # [documents, longest]
        self.shape = present.shape
        # Computed on the host, which knows the lengths: no synchronisation.
        self.places = present.flatten().nonzero().squeeze(1).to(bias.device)
        self.mask = bias.masked_fill(~present[:, None, None].to(bias.device), float("-inf"))

    def __call__(self, heads):
        padded = heads.new_zeros(self.shape.numel(), *heads.shape[1:]).index_copy_(0, self.places, heads)
        query_key_value = padded.unflatten(0, self.shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*query_key_value, attn_mask=self.mask, scale=1.0)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[self.places]


# By device type; PaddedAttention on all others. On a CPU, padding costs more than further calls.
ENCODER_ATTENTION = {"cpu": SeparateAttention}


class Memory:
    """The cross-attention keys and values of a few documents in each layer, padded to one length. Once all layers are
    added, these tensors are never written to, so copies of a Memory can share them.

    The decoder has no rows for ended beams, so `attend` places its rows in a table of documents x beams.
    """

    def __init__(self, lengths):
        self.lengths = lengths
        self.documents, self.beams, self.rows = len(lengths), 1, len(lengths)
        self.keys, self.values = [], []
        self.places = self.mask = None

    def add_layer(self, key_value):
        """key_value: [sum of lengths, 2, heads, head size]."""
        _, _, heads, size = key_value.shape
        keys = key_value.new_zeros(self.documents, heads, size, max(self.lengths))
        values = key_value.new_zeros(self.documents, heads, max(self.lengths), size)
        for document, part in enumerate(key_value.split(self.lengths)):
            keys[document, :, :, : len(part)] = part[:, 0].permute(1, 2, 0)
            values[document, :, : len(part)] = part[:, 1].transpose(0, 1)
        self.keys.append(keys)
        self.values.append(values)
        if self.mask is None and min(self.lengths) < max(self.lengths):
            position = torch.arange(max(self.lengths), device=keys.device)
            padding = position >= torch.tensor(self.lengths, device=keys.device).unsqueeze(1)
            self.mask = keys.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))[:, None, None]

    def spread(self, beams):
        self.beams, self.rows = beams, self.documents * beams

    def keep(self, rows):
        """Drop all rows but these, int64 [rows to keep], and documents without any row left."""
        if len(rows) == self.rows:
            return
        self.rows = len(rows)
        places = rows if self.places is None else self.places[rows]
        documents, row_documents = torch.unique(places // self.beams, return_inverse=True)
        self.places = row_documents * self.beams + places % self.beams
        if len(documents) < self.documents:
            self.documents = len(documents)
            self.keys = [keys.index_select(0, documents) for keys in self.keys]
            self.values = [values.index_select(0, documents) for values in self.values]
            self.mask = None if self.mask is None else self.mask.index_select(0, documents)

    def attend(self, query, index):
        """Cross-attention in layer `index`. query and result: [rows, heads, head size]."""
        table = query
        if self.places is not None:
            table = query.new_zeros(self.documents * self.beams, *query.shape[1:]).index_copy_(0, self.places, query)
        table = table.unflatten(0, (self.documents, self.beams)).transpose(1, 2)
        weights = torch.matmul(table, self.keys[index])
        if self.mask is not None:
            weights += self.mask
        mixed = torch.matmul(weights.softmax(-1), self.values[index]).transpose(1, 2).flatten(0, 1)
        return mixed if self.places is None else mixed[self.places]


def _read_layer(block, activation):
    """The sublayers of an encoder block (two) or decoder block (three), in order. activation: a name of ACT2FN."""
    own, *cross, dense = block.layer
    attention = own.SelfAttention
    query_key_value = _product(attention.q.weight, attention.k.weight, attention.v.weight)
    layer = [SelfAttention(own.layer_norm.weight, query_key_value, _product(attention.o.weight))]
    for sublayer in cross:
        attention = sublayer.EncDecAttention
        query, key_value = _product(attention.q.weight), _product(attention.k.weight, attention.v.weight)
        layer.append(CrossAttention(sublayer.layer_norm.weight, query, key_value, _product(attention.o.weight)))
    inner = dense.DenseReluDense
    read_inner = _gated_product if hasattr(inner, "wi_0") else _activated_product
    layer.append(FeedForward(dense.layer_norm.weight, read_inner(inner, activation), _product(inner.wo.weight)))
    return layer


def _gated_product(inner, activation):
    product, activate = _product(inner.wi_0.weight, inner.wi_1.weight), ACT2FN[activation]

    def gated_product(x):
        gate, linear = product(x).chunk(2, dim=-1)
        return activate(gate) * linear

    return gated_product


def _activated_product(inner, activation):
    if activation == "relu":
        return _product(inner.wi.weight, relu=True)
    product, activate = _product(inner.wi.weight), ACT2FN[activation]
    return lambda x: activate(product(x))


def _product(*weights, relu=False):
    """A function x -> x @ W.T, where W is the concatenation of matrices [out, in]; with `relu`, followed by ReLU."""
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if weight.device.type == "cpu":
        # Private operators: a torch version where they are missing or different raises one of these.
        with contextlib.suppress(AttributeError, RuntimeError, TypeError):
            return _packed_product(weight, relu)
    return lambda x: F.linear(x, weight).relu_() if relu else F.linear(x, weight)


def _packed_product(weight, relu):
    """`_product` with a weight matrix in oneDNN's layout for the processor, as with torch.compile's freezing. On an
    EPYC, it is 1.2 to 1.7 times faster than F.linear for 64 to 256 rows of float32; on a Xeon with AMX, 1.0 to 1.5
    times for 128 to 256 rows of bfloat16."""
    packed, then = torch.ops.mkldnn._reorder_linear_weight(weight), "relu" if relu else "none"

    def multiply(x):
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, then, [], "")

    multiply(weight.new_zeros(1, weight.shape[1]))  # Fails here if it is not supported.
    return multiply
