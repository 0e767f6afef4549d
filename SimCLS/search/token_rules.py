"""Shared by all searches: a generator's decoder, its special tokens, and which tokens may come next."""

import itertools

import torch

from harness.shapes import COUNT, NUMBER, WHOLE, each, fault, is_number, maybe
from search.bart_decoder import BartDecoder
from search.library_decoder import LibraryDecoder
from search.t5_decoder import T5Decoder

# Unsupported settings of a generation config that would change the candidates, with their neutral values.
UNSUPPORTED = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "guidance_scale": (None, 1, 1.0),
    "renormalize_logits": (None, False),
    "exponential_decay_length_penalty": (None,),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "min_new_tokens": (None, 0),
    "watermarking_config": (None,),
    "force_words_ids": (None,),
    "constraints": (None, []),
    "forced_decoder_ids": (None, []),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "max_time": (None,),
}
# `check_tokens` checks that they are in the vocabulary.
TOKEN = ("the number of a token", lambda value: is_number(value) and isinstance(value, int))
SOME_TOKENS = (
    "the number of a token, or a list of these",
    lambda value: fault(value if isinstance(value, list) else [value], each(list, TOKEN)) is None,
)
NOT_NEGATIVE = ("a whole number of at least 0", COUNT[1])
# The settings that are read from a generation config, and their valid values.
SETTINGS = {
    "max_length": ("a whole number above 1", lambda value: WHOLE[1](value) and value > 1),
    "max_new_tokens": WHOLE,
    "min_length": NOT_NEGATIVE,
    "no_repeat_ngram_size": NOT_NEGATIVE,
    "length_penalty": ("a number from -10 to 10", lambda value: NUMBER[1](value) and abs(value) <= 10),
    "bos_token_id": SOME_TOKENS,
    "decoder_start_token_id": SOME_TOKENS,
    "eos_token_id": SOME_TOKENS,
    "pad_token_id": TOKEN,
    "forced_bos_token_id": SOME_TOKENS,
    "forced_eos_token_id": SOME_TOKENS,
    "suppress_tokens": each(list, TOKEN),
    "bad_words_ids": each(list, each(list, TOKEN)),
}


def make_decoder(model):
    """The fastest decoder that knows this kind of model."""
    for kind in (T5Decoder, BartDecoder):
        if kind.supports(model):
            return kind(model)
    return LibraryDecoder(model)


class TokenRules:
    """The base class of the searches: a model's decoder, and the tokens that may come next.

    model: any AutoModelForSeq2SeqLM in eval mode. Its generation config has the start, end and padding tokens, forced
    first and last tokens, and suppressed tokens. The weights are read here: after further training, make a new object.
    max_length, min_length, no_repeat_ngram_size: as for DiverseBeamSearch. decoder: that of another search with the
    same model, to share it; they must run one after the other.

    Raises ValueError for a maximum length that leaves no room, and for unsupported settings in the generation config
    (such as a repetition penalty).
    """

    unsupported = UNSUPPORTED

    def __init__(self, model, max_length, min_length, no_repeat_ngram_size, decoder=None):
        if max_length < 2:
            raise ValueError(f"a maximum length of {max_length} leaves no room after the start token")
        self.decoder = decoder or make_decoder(model)
        self.device = model.device
        self.max_length, self.min_length = max_length, min_length
        self.no_repeat_ngram_size = no_repeat_ngram_size
        self._read_tokens(model.generation_config)
        forced = itertools.chain(*self.forced.values())
        numbers = [*self.end_tokens.tolist(), *self.suppressed.tolist(), *forced]
        check_tokens(model, [self.start_token, self.pad_token, *numbers])
        if len(self.suppressed.unique()) == _vocabulary(model):
            raise ValueError("the model's generation config suppresses all tokens")

    def _read_tokens(self, config):
        for name in unsupported_settings(config, self.unsupported):
            raise ValueError(f"the model's generation config sets {name}, which this search does not support")
        self.start_token = _first(config.decoder_start_token_id, config.bos_token_id)
        if self.start_token is None:
            raise ValueError("the model's generation config has no decoder_start_token_id")
        end_tokens = _as_list(config.eos_token_id)
        self.pad_token = _padding(config)
        suppressed = list(config.suppress_tokens or [])
        for words in config.bad_words_ids or []:
            if len(words) > 1:
                raise ValueError("the model's generation config has bad_words_ids of more than one token")
            suppressed += [token for token in words if token not in end_tokens]
        self.end_tokens = torch.tensor(end_tokens, dtype=torch.long, device=self.device)
        self.suppressed = torch.tensor(suppressed, dtype=torch.long, device=self.device)
        self.forced = {1: _as_list(config.forced_bos_token_id)}
        if config.forced_eos_token_id is not None:
            self.forced[self.max_length - 1] = _as_list(config.forced_eos_token_id)

    @torch.inference_mode()
    def encode(self, input_ids, attention_mask):
        """Encode a batch of documents for any number of searches. input_ids, attention_mask: int64 [documents, length],
        padded at the end; no document is empty."""
        return self.decoder.encode(input_ids, attention_mask)

    def allowed(self, logits, history):
        """Log-probabilities of the next token, float32 [rows, vocabulary]; -inf for forbidden tokens.

        logits: [rows, vocabulary]. history: int64 [rows, length], beginning with the start token.
        """
        log_probs = logits.float().log_softmax(-1)
        if self.no_repeat_ngram_size:
            forbid_repeats(log_probs, history, self.no_repeat_ngram_size)
        if len(self.suppressed):
            log_probs[:, self.suppressed] = float("-inf")
        if history.shape[1] < self.min_length:
            log_probs[:, self.end_tokens] = float("-inf")
        return log_probs


def unsupported_settings(config, unsupported=UNSUPPORTED):
    """The names of the settings of a GenerationConfig with which no search here works. unsupported: {name: values that
    change nothing}."""
    return [name for name, neutral in unsupported.items() if getattr(config, name, None) not in neutral]


def check_settings(config):
    """ValueError, naming the setting, for an invalid setting of a GenerationConfig."""
    wrong = fault(vars(config), {name: maybe(shape) for name, shape in SETTINGS.items()})
    if wrong:
        raise ValueError(f"in its generation_config.json {wrong}")


def check_start(model, tokenizer):
    """ValueError unless summaries start with the same token in generation as in training.

    A decoder_start_token_id that is a list of one token is replaced by that token.
    """
    for config in (model.config, model.generation_config):
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, list):
            if len(set(start)) != 1:
                raise ValueError(f"decoder_start_token_id is {start}; it must be one token")
            config.decoder_start_token_id = start[0]
    generated = model.generation_config.decoder_start_token_id
    if generated is None:
        generated = model.generation_config.bos_token_id
    check_tokens(model, [] if generated is None else [generated])
    if hasattr(tokenizer, "tgt_lang") and tokenizer.tgt_lang is None:
        raise ValueError("its tokenizer has no target language; set tgt_lang in tokenizer_config.json")
    try:
        labels = torch.tensor([tokenizer(text_target="a")["input_ids"]])  # mBART moves the last one to the front.
        trained = int(model.prepare_decoder_input_ids_from_labels(labels=labels)[0, 0])
    except AttributeError:  # The model shifts its labels itself.
        trained = getattr(model.config, "decoder_start_token_id", None)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "pad_token_id" in reason:
            reason = "its config.json has no pad_token_id; set it"
        raise ValueError(reason) from None
    if trained != generated:
        raise ValueError(
            f"summaries start with token {trained} in training and with {generated} in generation; set "
            "decoder_start_token_id in config.json and generation_config.json"
        )


def check_target_vocabulary(model, tokenizer):
    """ValueError if `model` cannot write all tokens of `tokenizer`."""
    head = model.get_output_embeddings()
    if head is None or getattr(
        tokenizer, "separate_vocabs", False
    ):  # Marian's may have fewer target than source tokens.
        return
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if tokens > len(head.weight):
        raise ValueError(f"its tokenizer has {tokens} tokens, but its decoder only {len(head.weight)}")


def check_end(model, tokenizer):
    """ValueError unless the end tokens of generation include one that the tokenizer puts into texts in training (not
    checked for tokenizers that add no end token), and unless decoding omits what follows the end."""
    config = model.generation_config
    known = tokenizer.eos_token_id, tokenizer.sep_token_id
    trained = [token for token in tokenizer(text_target="a")["input_ids"] if token in known]
    generated = [token for token in _as_list(config.eos_token_id) if token not in (config.suppress_tokens or [])]
    if trained and not set(trained) & set(generated):
        raise ValueError(
            f"summaries end with token {trained[-1]} in training and with {generated or 'none'} in generation; set "
            "eos_token_id in generation_config.json, and suppress_tokens without it"
        )
    padding = _padding(config)
    if padding not in tokenizer.all_special_ids:
        raise ValueError(
            f"summaries are padded with token {padding}, which is text to the tokenizer; set pad_token_id in "
            "generation_config.json"
        )


def _padding(config):
    return _first(config.pad_token_id, *_as_list(config.eos_token_id), 0)


def check_tokens(model, tokens):
    """ValueError if one of the `tokens`, from a config of the model, is not in its vocabulary. Too large a number would
    end the run at some text, and a negative one would mean another token."""
    count = _vocabulary(model)
    for token in tokens:
        if not (isinstance(token, int) and 0 <= token < count):
            raise ValueError(f"its generation config has the token {token!r}, but the model's are 0 to {count - 1}")


def _vocabulary(model):
    """The number of tokens that `model` can write."""
    return (model.get_output_embeddings() or model.get_input_embeddings()).weight.shape[0]


def forbid_repeats(scores, history, size):
    """Set to -inf, in place, the score of each token that would repeat an n-gram of its row.

    scores: float [rows, vocabulary]. history: int64 [rows, length]. size: the n of the n-grams.
    """
    length = history.shape[1]
    if length < size:
        return
    ngrams = history.unfold(1, size, 1)
    matches = (ngrams[:, :, :-1] == history[:, None, length - size + 1 :]).all(-1)
    bans = torch.where(matches, float("-inf"), float("inf"))
    scores.scatter_reduce_(1, ngrams[:, :, -1], bans, "amin")


def _first(*values):
    return next((value for value in values if value is not None), None)


def _as_list(tokens):
    return [] if tokens is None else [tokens] if isinstance(tokens, int) else list(tokens)
