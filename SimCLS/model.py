"""The scorer of SimCLS: an encoder that places better summaries closer to their document.

Liu and Liu 2021, "SimCLS: A Simple Framework for Contrastive Learning of Abstractive Summarization" (ACL), and its
published code, github.com/yixinL7/SimCLS. A text is represented by the final state of its first token; the score of a
summary is the cosine similarity of its state and the document's.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data_utils import TextEncoding
from torch import nn

from harness import endings, torchvision_compat  # noqa: F401
from harness.endings import UserError
from harness.files import atomic_write, write_json
from harness.resume import read_tensors
from harness.shapes import NUMBER, TEXT, WHOLE, each, fault, maybe

# isort: split
from transformers import AutoModelForTextEncoding

from pretrained import minilm
from pretrained.model_folders import DROPOUT_KEYS, check_length, computation, load, most_tokens
from scorer import short_attention
from scorer.converted_weights import convert_once
from texts import provenance

# The settings of the published scorers: the margin, and the most tokens of a document and of a summary.
MARGIN = 0.01
TOTAL_LEN, MAX_LEN = 512, 120
# Model types that split their layers' parts over several lists, or have weights after the layers that all of them use.
NO_LAYERS = ("xlm", "flaubert", "deberta", "deberta-v2")
# What scorer.json holds. Older files, and those of other programs, have less of it.
TEXTS = ("architecture", "tokenizer", "tokenizer_settings", "rouge_tokens", "training")
COUNTS = ("hidden_size", "layers", "vocabulary", "total_len", "max_len", "candidates")
DESCRIPTION = {"encoder": TEXT} | dict.fromkeys(TEXTS, maybe(TEXT)) | dict.fromkeys(COUNTS, maybe(WHOLE))
DESCRIPTION["config"] = maybe(("an object", lambda value: isinstance(value, dict)))
DESCRIPTION |= dict.fromkeys(("samples", "validation"), maybe(provenance.SHAPE))
DESCRIPTION["earlier_samples"] = maybe(each(list, provenance.SHAPE))
DESCRIPTION["weights"] = maybe(
    {"likelihood": NUMBER, "agreement": NUMBER, "power": NUMBER, "scorer_digest": maybe(TEXT)}
)


class Scorer(nn.Module):
    """encoder: a bidirectional transformers model, as from `load_encoder`."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.name = encoder.name_or_path  # For messages: the encoder, or the file of trained weights.
        self._skip_unused_states()
        convert_once(encoder)

    def _skip_unused_states(self):
        """Let the last layer's feed-forward part compute only the first token's state, since no other final state is
        used. The scores are the same. For the BERT family and T5."""
        for last in [*self._layers()][-1:]:
            if hasattr(last, "feed_forward_chunk") and hasattr(last, "intermediate"):  # Of BERT.
                last.intermediate.register_forward_pre_hook(lambda part, states: (states[0][:, :1],))
                last.output.register_forward_pre_hook(lambda part, states: (states[0], states[1][:, :1]))
            elif isinstance(getattr(last, "layer", None), nn.ModuleList) and hasattr(last.layer[-1], "DenseReluDense"):
                last.layer[-1].register_forward_pre_hook(lambda part, states: (states[0][:, :1],))  # Of T5.

    def _layers(self):
        """The encoder's layers, in order; () if it has no list of them."""
        depth = getattr(self.encoder.config, "num_hidden_layers", 0)
        lists = (each for each in self.encoder.modules() if isinstance(each, nn.ModuleList) and len(each) == depth)
        return next(lists, ())

    def forward(self, batch):
        """Score the candidates and the reference of every document of a `data_utils.Batch`.

        Returns (candidates float32 [documents, candidates], references float32 [documents]), cosine similarities. The
        scores of missing candidates are meaningless; `batch.present` marks the valid ones.
        """
        states = self.encode_texts(batch.texts, batch.lengths)
        documents = states[batch.documents]
        candidates = F.cosine_similarity(states[batch.candidates], documents[:, None], dim=-1)
        return candidates, F.cosine_similarity(states[batch.references], documents, dim=-1)

    def encode_texts(self, texts, lengths):
        """The final state of every text's first token, float32 [rows, hidden], with one encoder call per group.

        texts: list of int64 [rows, tokens], padded at the end. lengths: list of int64 [rows], or None for a group
        without padding.
        """
        states = [self._encode_group(ids, length) for ids, length in zip(texts, lengths, strict=True)]
        return torch.cat(states).float()

    def _encode_group(self, ids, lengths):
        mask = None
        if lengths is not None:
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
            if self.encoder.config._attn_implementation in ("sdpa", short_attention.NAME):
                # For a 2D mask, transformers checks whether it hides anything, which would synchronise with the device.
                # A 4D mask is used as it is.
                mask = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]

    def recompute_activations(self):
        """Keep only each encoder layer's input for backward, and recompute the rest of the layer then. UserError if
        transformers does not support it."""
        # Where the newer name exists, the older one warns; both take the arguments of torch.utils.checkpoint.
        enable = getattr(self.encoder, "activation_checkpointing_enable", self.encoder.gradient_checkpointing_enable)
        try:
            enable({"use_reentrant": False})
        except ValueError:  # Some model types do not support it.
            raise UserError(
                "--use_checkpoint: transformers cannot recompute the activations of the encoder "
                f"{self.encoder.name_or_path} ({self.encoder.config.model_type}); leave it out"
            ) from None
        # Reentrant checkpointing needs embeddings that require gradients, so the library sets that. Here it would make
        # backward run through frozen layers and recompute them.
        self.encoder.disable_input_require_grads()

    def freeze_layers(self, count):
        """Freeze the embeddings and the lowest `count` layers; backward ends above them.

        UserError if the encoder has no list of its layers, or not more than `count` of them.
        """
        kind, layers = self.encoder.config.model_type, self._layers()
        where = f"--frozen_layers {count}: {self.encoder.name_or_path}"
        if kind in NO_LAYERS:
            raise UserError(f"{where}: the layers of {kind} cannot be frozen one by one; leave it out")
        first = next(iter(layers[count].parameters()), None) if count < len(layers) else None
        if first is None:
            raise UserError(f"{where}: the encoder has {len(layers)} layers, and one must learn; give a smaller number")
        for weights in self.encoder.parameters():  # In the order of the forward pass.
            if weights is first:
                break
            weights.requires_grad_(False)


def ranking_loss(scores, gold_scores, rouge, present, margin=MARGIN, gold_margin=0.0, gold_weight=1.0):
    """The SimCLS loss, averaged over documents. It ranks the candidates by ROUGE, with a margin per rank.

    Of two candidates, the one with the lower ROUGE must score lower by at least `margin` times the difference of their
    ranks; the shortfall is the pair's loss. As in the published code, the losses of all pairs with rank difference d
    are summed and divided by (candidates - d), which is their number if there are no ties. Candidates with equal ROUGE
    share their mean rank and form no pair, so nothing separates them, and their order does not matter. Ties leave fewer
    distinct differences, so a document with ties weighs more. The reference must score at least `gold_margin` above
    each candidate; its shortfall is averaged over the candidates and weighted by `gold_weight`.

    scores: float [documents, candidates]. gold_scores: float [documents], of the references. rouge: float
    [documents, candidates]. present: bool [documents, candidates], False for missing candidates.
    """
    pairs = present[:, :, None] & present[:, None, :]
    better = pairs & (rouge[:, :, None] > rouge[:, None, :])  # [document, candidate, a worse one]
    equal = pairs & (rouge[:, :, None] == rouge[:, None, :])
    count = present.sum(1)
    ranks = better.sum(1) + (equal.sum(1) - 1) / 2  # 0 for the best
    distance = ranks[:, None, :] - ranks[:, :, None]
    missing = F.relu(scores[:, None, :] - scores[:, :, None] + margin * distance)
    # Without ties a difference of d occurs in (count - d) pairs.
    candidate_loss = torch.where(better, missing / (count[:, None, None] - distance).clamp(min=1), 0).sum((1, 2))
    missing = F.relu(scores - gold_scores[:, None] + gold_margin)
    gold_loss = torch.where(present, missing, 0).sum(1) / count
    return (candidate_loss + gold_weight * gold_loss).mean()


@torch.inference_mode()
def score_samples(scorer, samples, numbers, batch_size, device, precision):
    """Yield (numbers, batch, candidates' scores, references' scores) for consecutive batches of `numbers`, without
    dropout; the tensors are on `device`.

    samples: data_utils.SampleSet. numbers: int array, preferably sorted by document length. precision: harness
    Precision.
    """
    scorer.eval()
    try:
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            batch = samples.batch(part).to(device)
            with precision.autocast():
                scores, gold_scores = scorer(batch)
            yield part, batch, scores, gold_scores
    finally:
        scorer.train()


def check_scores(scores, scorer):
    """UserError unless the scores of `scorer`, a NumPy array, are finite: no candidate is the best among NaN."""
    if not np.isfinite(scores).all():
        raise UserError(
            f"the scorer {scorer.name} gives scores that are NaN or infinite; copy it again, train it again with a "
            "smaller --lr, or use bfloat16 or single precision instead of float16"
        )


def load_encoder(name, dropout=0.0):
    """(encoder in float32, tokenizer) from a folder in `from_pretrained` form, a name on the hub, or "minilm".

    dropout: its probability in training, wherever the encoder has dropout.

    UserError if it cannot be loaded or is not a text encoder.
    """
    # The library's default, the precision of the file, may be a half precision, which would lose small updates.
    encoder, tokenizer = load(
        minilm.resolve(name),
        AutoModelForTextEncoding,
        problem=f"cannot load an encoder from {name!r}, as a folder or as a name on the hub",
        advice=minilm.ADVICE if name == minilm.NAME else "create_model.py makes one from scratch",
        dtype=torch.float32,
        chunk_size_feed_forward=0,  # Chunks would need all tokens where only the first one's state is computed.
        **dict.fromkeys(DROPOUT_KEYS, dropout),
    )
    if hasattr(encoder.config, "axial_pos_embds"):  # Reformer. In training, it reads only multiples of its chunks.
        raise UserError(f"{name!r} reads only texts of certain lengths; choose another encoder")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # Unused: its weights would never get a gradient.
    check_reads_on(encoder, name)
    return encoder.train(), tokenizer  # from_pretrained switches dropout off.


@torch.no_grad()
def check_reads_on(encoder, name):
    """UserError unless the first token's state depends on the tokens after it. In a decoder it does not, so all texts
    would have the same state. UserError, too, if `encoder` cannot run."""
    ids = torch.zeros(2, 4, dtype=torch.int64)
    ids[1, -1] = 1
    try:
        one, other = encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
        reads_on = not torch.equal(one, other)
    except Exception as error:  # Other kinds of models may raise anything.
        if endings.explain(error):  # Such as out of memory, which is not the model's fault.
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{name!r} cannot encode a text ({reason}); correct its config.json, or choose another"
        ) from None
    if not reads_on:
        raise UserError(f"{name!r} is not a text encoder whose first token attends to later ones; choose another")


def load_scorer(name=None, weights=None, total_len=None, max_len=None, dropout=0.0):
    """(Scorer on the CPU, data_utils.TextEncoding, description), for training or scoring.

    name: the encoder, as for `load_encoder`; None for the one that `weights` was trained for, or else roberta-base.
    weights: path of a trained scorer, or None for the encoder as it is. total_len, max_len: the most tokens of a
    document and of a summary; None for those of the training, or else TOTAL_LEN and MAX_LEN, reduced to what the
    encoder and its tokenizer support. The encoding has the lengths in use. dropout: in training.

    UserError if the encoder or the weights cannot be loaded or do not match, and for lengths that leave no room for
    text or exceed the encoder's positions.
    """
    trained = (weights and read_description(weights)) or {}
    name = name or trained.get("encoder", "roberta-base")
    encoder, tokenizer = load_encoder(name, dropout)
    encoding = TextEncoding(tokenizer, TOTAL_LEN, MAX_LEN)
    special, most = len(encoding.summaries([""])[0]), most_tokens(encoder)
    own = min(most, tokenizer.model_max_length)
    encoding.total_len = total_len or trained.get("total_len") or min(TOTAL_LEN, own)
    encoding.max_len = max_len or trained.get("max_len") or min(MAX_LEN, own)
    for flag, given, length in (("total_len", total_len, encoding.total_len), ("max_len", max_len, encoding.max_len)):
        check_length(f"--{flag}" if given else f"its {flag} of", length, special, most)
    scorer, description = Scorer(encoder), _describe(name, encoder, encoding)
    if "candidates" in trained:  # The candidates per document in training.
        description["candidates"] = trained["candidates"]
    if weights:
        load_weights(weights, scorer, description)
    return scorer, encoding, description


def _describe(name, encoder, texts):
    """The properties that must match wherever a scorer's weights are used, a dict of plain JSON values."""
    return {
        "encoder": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "architecture": encoder.config.model_type,
        "hidden_size": encoder.config.hidden_size,
        "layers": encoder.config.num_hidden_layers,
        "vocabulary": encoder.config.vocab_size,
        "config": computation(encoder.config),
        "tokenizer": texts.fingerprint,
        "tokenizer_settings": texts.settings_digest,
        "total_len": texts.total_len,
        "max_len": texts.max_len,
    }


def save_scorer(path, scorer, description):
    """Write the state dict to `path`, and `description` to scorer.json in the same folder, each atomically."""
    write_json(path.with_name("scorer.json"), description)
    with atomic_write(path) as file:
        torch.save(scorer.state_dict(), file)


def read_description(path):
    """The description of the weights `path`, from scorer.json in the same folder; None if there is none, as in the
    published releases. UserError if it is damaged."""
    path = Path(path).with_name("scorer.json")
    try:
        with open(path, encoding="utf-8") as file:
            description = json.load(file)
        wrong = fault(description, DESCRIPTION)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        wrong = "it is not JSON"
    if wrong:
        raise UserError(f"{path} does not describe a scorer ({wrong}); copy it again from where the scorer was trained")
    # In an older file any of them may be null.
    return {name: value for name, value in description.items() if value is not None}


def _changed_settings(trained, ours):
    """The settings of an encoder's `computation` that differ from those in training, in words; "" if those are None."""
    names = sorted(ours.keys() | trained.keys()) if trained is not None else ()
    shown = {name: [settings.get(name, "off") for settings in (ours, trained)] for name in names}
    return ", ".join(f"{name} {now} (in training {then})" for name, (now, then) in shown.items() if now != then)


def load_weights(path, scorer, description):
    """Load the weights `path` into `scorer`, whose description is `description`.

    UserError if they cannot be read or were trained for another encoder.
    """
    trained = read_description(path) or {}
    for key in ("architecture", "hidden_size", "layers", "vocabulary", "tokenizer", "tokenizer_settings"):
        if key in trained and trained[key] != description[key]:
            raise UserError(
                f"{path} was trained for the encoder {trained['encoder']} ({key} {trained[key]}), not for "
                f"{description['encoder']} ({key} {description[key]}); give that encoder, or choose another scorer"
            )
    changed = _changed_settings(trained.get("config"), description["config"])
    if changed:
        raise UserError(
            f"{path} was trained for the encoder {trained['encoder']}, but the config.json of {description['encoder']} "
            f"has {changed}; give that encoder as it was, or choose another scorer"
        )
    try:
        weights = read_tensors(path)
        # The published scorers contain a pooler, and older ones position ids; neither is used.
        unused = [name for name in weights if name.endswith("position_ids") or ".pooler." in name]
        scorer.load_state_dict({name: value for name, value in weights.items() if name not in unused})
        scorer.name = str(path)
    except OSError as error:
        raise UserError(f"cannot read the scorer {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, pickle.UnpicklingError):
        raise UserError(
            f"{path} has no scorer weights for the encoder {description['encoder']}; give the encoder that "
            "it was trained for, or train another scorer"
        ) from None
