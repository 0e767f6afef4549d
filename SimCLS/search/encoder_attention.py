"""Self-attention within documents that an encoder gets concatenated, without padding in its matrix products.

The classes take lengths, a list of int; bias, [1, heads, longest, longest], which is added to the attention logits, or
None; and the device. A call takes query, key and value of all tokens, [sum of lengths, 3, heads, head size], and
returns [sum of lengths, heads * head size]. The logits are not scaled.
"""

import torch
import torch.nn.functional as F


class SeparateAttention:
    """One document at a time."""

    def __init__(self, lengths, bias, device):
        self.lengths, self.bias = lengths, bias

    def __call__(self, heads):
        parts = heads.unsqueeze(0).transpose(1, 3).split(self.lengths, dim=3)
        mixed = []
        for part, length in zip(parts, self.lengths, strict=True):
            mask = None if self.bias is None else self.bias[:, :, :length, :length]
            mixed.append(F.scaled_dot_product_attention(*part.unbind(2), attn_mask=mask, scale=1.0))
        return torch.cat(mixed, dim=2).transpose(1, 2).flatten(2).squeeze(0)


class PaddedAttention:
    """All documents at once, padded to one length: for a GPU, where many small calls take longer."""

    def __init__(self, lengths, bias, device):
        present = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)  # [documents, longest]
        self.shape = present.shape
        # Computed on the host, which knows the lengths: no synchronisation.
        self.places = present.flatten().nonzero().squeeze(1).to(device)
        present = present[:, None, None].to(device)
        self.mask = present if bias is None else bias.masked_fill(~present, float("-inf"))

    def __call__(self, heads):
        padded = heads.new_zeros(self.shape.numel(), *heads.shape[1:]).index_copy_(0, self.places, heads)
        query_key_value = padded.unflatten(0, self.shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*query_key_value, attn_mask=self.mask, scale=1.0)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[self.places]


# By device type; PaddedAttention on all others. On a CPU, padding costs more than further calls.
ENCODER_ATTENTION = {"cpu": SeparateAttention}
