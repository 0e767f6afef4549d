"""Encoder-decoders for beam search, run directly on the weights: the same results, without repeating the work that
beams share.

In contrast to the modules of transformers, it
- encodes the documents of a batch concatenated, without padding in the matrix products;
- keeps the encoder's keys and values once per document, shared by its beams (the library keeps a copy per beam);
- writes new keys and values in place, in caches that grow by 16 positions at a time;
- computes query, key and value in one product, with weights in oneDNN's layout for the processor;
- removes the rows of ended beams.
The results equal the library's up to the rounding of sums in another order.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from search.document_memory import Memory
from search.encoder_attention import ENCODER_ATTENTION, PaddedAttention

# In positions. Batched products run several times faster on contiguous memory, so caches grow by whole blocks, and
# positions not reached yet are masked.
CACHE_BLOCK = 16
# Documents that are encoded together, and padded to one length for cross-attention. On a CPU few, for little padding
# and so that their activations stay in the processor's cache; on a GPU the whole batch, for few kernels.
DOCUMENTS_TOGETHER = {"cpu": 4}


class SelfAttention(NamedTuple):
    """The weights of one sublayer. A Callable maps [rows, in] to [rows, out]. If the model scales its attention logits,
    the query is scaled instead."""

    norm: Callable
    query_key_value: Callable
    output: Callable


class CrossAttention(NamedTuple):
    norm: Callable
    query: Callable
    key_value: Callable
    output: Callable


class FeedForward(NamedTuple):
    norm: Callable
    inner: Callable
    output: Callable


class DirectDecoder:
    """Runs a model for a search: `encode`, `start`, then `step` repeatedly, with changes of rows in between.

    A row is one beam of one document: `start` makes one row per document, `spread` one per beam. Rows stay in the order
    of their documents. The weights are read at construction: after further training, make a new decoder.

    A subclass knows one kind of model. It has the methods that raise NotImplementedError here, and sets
    - norm_first: whether sublayers normalise their input (as in T5), or the sum of that and their result (as in BART);
    - heads, head_size;
    - weight: any parameter, for its type and device;
    - encoder_layers: a SelfAttention and a FeedForward for each; decoder_layers: with a CrossAttention in between;
    - encoder_norm, decoder_norm: what follows the last layer; to_vocabulary: from there to logits.
    """

    def _embed_documents(self, tokens, lengths):
        """The encoder's input, [sum of lengths, d_model]. tokens: int64 [sum of lengths]; lengths: list of int."""
        raise NotImplementedError

    def _embed_next(self, tokens):
        """The decoder's input at position self.length, [rows, d_model]. tokens: int64 [rows]."""
        raise NotImplementedError

    def _encoder_bias(self, length):
        """What is added to the encoder's attention logits, [1, heads, length, length], or None."""
        raise NotImplementedError

    def _decoder_bias(self, length):
        """What is added to the decoder's attention logits, [heads or 1, length, length]; of later keys, anything."""
        raise NotImplementedError

    def _limit(self, hidden):
        """What goes from one layer of the encoder to the next."""
        return hidden

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
        documents = sum(memory.documents for memory in encoded)
        self.length = 0
        self.keys = [self.weight.new_zeros(documents, self.heads, 0, self.head_size) for _ in self.decoder_layers]
        self.values = list(self.keys)
        capacity = -(-max_length // CACHE_BLOCK) * CACHE_BLOCK
        future = torch.ones(capacity, capacity, dtype=torch.bool, device=self.weight.device).triu(1)
        bias = self._decoder_bias(capacity).masked_fill(future, float("-inf"))
        self.bias = bias.transpose(0, 1).unsqueeze(2).contiguous()  # [query, head, 1, key]

    def step(self, tokens):
        """Append a token to each row, and return the logits of the next, [rows, vocabulary]. tokens: int64 [rows]."""
        if self.length % CACHE_BLOCK == 0:
            self.keys = [F.pad(keys, (0, 0, 0, CACHE_BLOCK)) for keys in self.keys]
            self.values = [F.pad(values, (0, 0, 0, CACHE_BLOCK)) for values in self.values]
        hidden = self._embed_next(tokens)
        for index, (self_attention, cross_attention, feed_forward) in enumerate(self.decoder_layers):
            hidden = self._sublayer(hidden, self_attention, self._attend_to_beam, index)
            hidden = self._sublayer(hidden, cross_attention, self._attend_to_document, index)
            hidden = self._sublayer(hidden, feed_forward, self._feed_forward)
        self.length += 1
        return self.to_vocabulary(self.decoder_norm(hidden))

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

    def _sublayer(self, hidden, layer, compute, *arguments):
        if self.norm_first:
            return hidden + compute(layer, layer.norm(hidden), *arguments)
        return layer.norm(hidden + compute(layer, hidden, *arguments))

    def _encode(self, tokens, lengths):
        """Encode concatenated documents. tokens: int64 [sum of lengths]. Returns [sum of lengths, d_model]."""
        bias = self._encoder_bias(max(lengths))
        attention = ENCODER_ATTENTION.get(tokens.device.type, PaddedAttention)(lengths, bias, tokens.device)
        hidden = self._embed_documents(tokens, lengths)
        for self_attention, feed_forward in self.encoder_layers:
            hidden = self._sublayer(hidden, self_attention, self._attend_within, attention)
            hidden = self._limit(self._sublayer(hidden, feed_forward, self._feed_forward))
        return self.encoder_norm(hidden)

    def _remember(self, tokens, lengths):
        """The Memory of concatenated documents. tokens: int64 [sum of lengths]."""
        hidden, memory = self._encode(tokens, lengths), Memory(lengths)
        for _, cross_attention, _ in self.decoder_layers:
            memory.add_layer(cross_attention.key_value(hidden).unflatten(1, (2, self.heads, self.head_size)))
        return memory

    def _attend_within(self, layer, hidden, attention):
        return layer.output(attention(layer.query_key_value(hidden).view(-1, 3, self.heads, self.head_size)))

    def _attend_to_beam(self, layer, hidden, index):
        keys, values = self.keys[index], self.values[index]
        heads = layer.query_key_value(hidden)
        query, key, value = heads.view(len(hidden), 3, self.heads, self.head_size).unbind(1)
        keys[:, :, self.length] = key
        values[:, :, self.length] = value
        weights = torch.matmul(query.unsqueeze(2), keys.transpose(2, 3))
        weights += self.bias[self.length, :, :, : keys.shape[2]]
        return layer.output(torch.matmul(weights.softmax(-1), values).flatten(1))

    def _attend_to_document(self, layer, hidden, index):
        query = layer.query(hidden).unflatten(1, (self.heads, self.head_size))
        parts = query.split([memory.rows for memory in self.memories])
        mixed = [memory.attend(part, index) for memory, part in zip(self.memories, parts, strict=True)]
        return layer.output(torch.cat(mixed).flatten(1))

    def _feed_forward(self, layer, hidden):
        return layer.output(layer.inner(hidden))
