"""Attention that is fast for short texts, too, when an encoder trains in bfloat16 on a CPU.

There, the backward pass of PyTorch's fused attention takes up to ten times as long as separate matrix products
(PyTorch 2.13 on a Xeon with AMX; 36 texts of 16 tokens, 12 heads of 32 numbers: 42 ms instead of 3). From some 250
tokens on, and in float32, it is not slower, and it never keeps the attention weights in memory.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fused_unless_short"  # As the library's configs call it.
SHORT = 128  # Tokens.


def prefer(encoder, device, dtype):
    """Let `encoder`, a transformers model, use `attention` if it will train with autocast of `dtype` on `device`, where
    that is faster, and if it uses fused attention."""
    if device.type == "cpu" and dtype is torch.bfloat16 and encoder.config._attn_implementation == "sdpa":
        encoder.set_attn_implementation(NAME)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **more):
    """As the library's `sdpa_attention_forward`, with separate products where they are faster.

    query, key, value: [texts, heads, tokens, numbers]. attention_mask: bool (True is visible) or float (added),
    [texts, 1 or heads, tokens or 1, tokens], or None. Returns ([texts, tokens, heads, numbers], None).
    """
    is_slow = query.requires_grad and query.dtype is torch.bfloat16 and query.shape[2] <= SHORT
    is_causal = attention_mask is None and getattr(module, "is_causal", True)
    is_special = is_causal or any(each is not None for each in more.values()) or key.shape[1] != query.shape[1]
    if not is_slow or is_special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    weights = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(weights.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
