"""By what a generator is known again: digests of its weights, its vocabulary and its configs."""

import hashlib
import json

import torch

from pretrained.model_folders import computation
from texts import provenance


def fingerprint(model, tokenizer, dtype=None):
    """A digest of a generator's weights, vocabulary and generation config. dtype: to convert its floats to, or None.

    What its config.json says of the computation is not in it but in `config_digest`: older files lack that.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu()
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    tokens = model.generation_config.to_dict() | {"transformers_version": None}
    for part in (sorted(tokenizer.get_vocab().items()), tokens):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def config_digest(model):
    """A digest of what a generator's config says of its computation, such as the activation function."""
    return provenance.digest(computation(model.config))
