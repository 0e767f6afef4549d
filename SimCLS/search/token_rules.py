"""What every search reads from a generator: its decoder, its special tokens, and which tokens may follow a text."""

import itertools

import torch

from reporting.shapes import COUNT, NUMBER, WHOLE, each, fault, is_number, maybe
from search.library_decoder import LibraryDecoder
from search.t5_decoder import T5Decoder

# Settings of a generation config that would change the candidates, and the values that leave them as they are.
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
}
# Which ones there are, `check_tokens` knows.
TOKEN = ("the number of a token", lambda value: is_number(value) and isinstance(value, int))
SOME_TOKENS = (
    "the number of a token, or a list of these",
    lambda value: fault(value if isinstance(value, list) else [value], each(list, TOKEN)) is None,
)
NOT_NEGATIVE = ("a whole number from 0", COUNT[1])
# What is read of a generation config.
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


class TokenRules:
    """The decoder of a model and the tokens that may come next; the searches are subclasses.

    model: any AutoModelForSeq2SeqLM in eval mode. Its generation config gives the start, end and padding tokens, forced
    first and last tokens, and suppressed ones. The weights are read here: train on, and a new object is needed.
    max_length, min_length, no_repeat_ngram_size: as for DiverseBeamSearch. decoder: another search's of the same model,
    which it shares: they take turns.

    Raises ValueError for a maximum length without room, and for a generation config with a setting that is not
    implemented (a repetition penalty, say).
    """

    unsupported = UNSUPPORTED

    def __init__(self, model, max_length, min_length, no_repeat_ngram_size, decoder=None):
        if max_length < 2:
            raise ValueError(f"a maximum length of {max_length} leaves no room behind the start token")
        self.decoder = decoder or (T5Decoder if T5Decoder.supports(model) else LibraryDecoder)(model)
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
        for name, neutral in self.unsupported.items():
            if getattr(config, name, None) not in neutral:
                raise ValueError(f"the model's generation config sets {name}, which the search leaves out")
        self.start_token = _first(config.decoder_start_token_id, config.bos_token_id)
        if self.start_token is None:
            raise ValueError("the model's generation config has no decoder_start_token_id")
        end_tokens = _as_list(config.eos_token_id)
        self.pad_token = _first(config.pad_token_id, *end_tokens, 0)
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
        """A batch of documents as a search takes it, however often. input_ids, attention_mask: int64 [documents,
        length], padded at the end; no document is empty."""
        return self.decoder.encode(input_ids, attention_mask)

    def allowed(self, logits, history):
        """Log-probabilities of the next token, float32 [rows, vocabulary], -inf where it may not come.

        logits: [rows, vocabulary]; history: int64 [rows, length], the start token first.
        """
        log_probs = logits.float().log_softmax(-1)
        if self.no_repeat_ngram_size:
            forbid_repeats(log_probs, history, self.no_repeat_ngram_size)
        if len(self.suppressed):
            log_probs[:, self.suppressed] = float("-inf")
        if history.shape[1] < self.min_length:
            log_probs[:, self.end_tokens] = float("-inf")
        return log_probs


def check_settings(config):
    """ValueError that names a setting of a GenerationConfig which is not what it has to be."""
    wrong = fault(vars(config), {name: maybe(shape) for name, shape in SETTINGS.items()})
    if wrong:
        raise ValueError(f"in its generation_config.json {wrong}")


def check_start(model, tokenizer):
    """ValueError unless summaries start in generation with the token with which they start in training.

    decoder_start_token_id as a list of one token becomes that token.
    """
    for config in (model.config, model.generation_config):
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, list):
            if len(set(start)) != 1:
                raise ValueError(f"decoder_start_token_id is {start}; it has to be one token")
            config.decoder_start_token_id = start[0]
    generated = model.generation_config.decoder_start_token_id
    if generated is None:
        generated = model.generation_config.bos_token_id
    check_tokens(model, [] if generated is None else [generated])
    if hasattr(tokenizer, "tgt_lang") and tokenizer.tgt_lang is None:
        raise ValueError("its tokenizer names no target language; set tgt_lang in tokenizer_config.json")
    try:
        labels = torch.tensor([tokenizer(text_target="a")["input_ids"]])  # Of mBART the last one comes first.
        trained = int(model.prepare_decoder_input_ids_from_labels(labels=labels)[0, 0])
    except AttributeError:  # The model shifts its labels itself.
        trained = getattr(model.config, "decoder_start_token_id", None)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "pad_token_id" in reason:
            reason = "its config.json names no pad_token_id; set it"
        raise ValueError(reason) from None
    if trained != generated:
        raise ValueError(
            f"summaries start with token {trained} in training and with {generated} in generation; set "
            "decoder_start_token_id in config.json and generation_config.json"
        )


def check_end(model, tokenizer):
    """ValueError unless one of the tokens that end summaries in generation ends them in training: the end token that
    the tokenizer puts behind a text. Where it puts none there, as some do, nothing is known."""
    known = tokenizer.eos_token_id, tokenizer.sep_token_id
    trained = [token for token in tokenizer(text_target="a")["input_ids"] if token in known]
    generated = _as_list(model.generation_config.eos_token_id)
    if trained and not set(trained) & set(generated):
        raise ValueError(
            f"summaries end with token {trained[-1]} in training and with {generated or 'none'} in generation; set "
            "eos_token_id in generation_config.json"
        )


def check_tokens(model, tokens):
    """ValueError where one of the `tokens`, of a config of the model's, is none that the model can write: the number of
    another vocabulary ends the run at some text, and a negative one means another token."""
    count = _vocabulary(model)
    for token in tokens:
        if not (isinstance(token, int) and 0 <= token < count):
            raise ValueError(f"its generation config names the token {token!r}; the model's are 0 to {count - 1}")


def _vocabulary(model):
    """How many tokens `model` can write."""
    return (model.get_output_embeddings() or model.get_input_embeddings()).weight.shape[0]


def forbid_repeats(scores, history, size):
    """Set to -inf, in place, each token that would complete an n-gram that its row has already.

    scores: float [rows, vocabulary]; history: int64 [rows, length]; size: the n of the n-grams.
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
