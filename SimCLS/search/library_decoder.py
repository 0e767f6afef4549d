"""Decoding for the searches with any encoder-decoder of transformers, by its own forward."""

from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput


class LibraryDecoder:
    """Decodes for a search by the model's own forward. For the methods' arguments and results see DirectDecoder."""

    def __init__(self, model):
        self.model, self.encoder = model, model.get_encoder()
        self.output_type = BaseModelOutput

    def encode(self, input_ids, attention_mask):
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        self.output_type = type(output)  # Mixtures of experts have a type of their own.
        return output[0], attention_mask

    def start(self, encoded, max_length):
        self.hidden, self.mask = encoded
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(self, tokens):
        output = self.model(
            encoder_outputs=self.output_type(last_hidden_state=self.hidden),
            attention_mask=self.mask,
            decoder_input_ids=tokens.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        return output.logits[:, -1]

    def spread(self, beams):
        self.cache.batch_repeat_interleave(beams)
        self.hidden = self.hidden.repeat_interleave(beams, dim=0)
        self.mask = self.mask.repeat_interleave(beams, dim=0)

    def reorder(self, rows):
        # The cross-attention cache stays as it is: rows change places only within a document.
        self.cache.self_attention_cache.reorder_cache(rows)

    def keep(self, rows):
        self.cache.batch_select_indices(rows)
        self.hidden, self.mask = self.hidden[rows], self.mask[rows]
