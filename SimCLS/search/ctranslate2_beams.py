"""Plain beam search by CTranslate2, an optional package: on a CPU, it is faster than ours for small models, or in int8.

benchmarks/beams.py compares the two. If no tokens are forbidden, both return the same candidates in float32, up to
ties. CTranslate2 redistributes the probability of forbidden tokens (minimum length, repeated n-grams) to the others.
"""

import tempfile

import torch

from harness.devices import widest_float
from harness.endings import UserError
from search.diverse_beam import Candidates
from search.t5_decoder import T5Decoder
from search.token_rules import TokenRules

PACKAGE = "ctranslate2==4.8.5"


class CTranslate2Beams(TokenRules):
    """Equivalent to DiverseBeamSearch with one group and early_stopping True, for T5 and mT5; called in the same way.

    compute_type: of CTranslate2, such as "float32" or "int8". The rest is as for DiverseBeamSearch.

    Raises ValueError as DiverseBeamSearch does, for other kinds of models, and for what CTranslate2 does not support:
    several end tokens, forced or suppressed tokens. UserError if the package is not installed.
    """

    def __init__(self, model, *, num_beams, max_length, min_length, length_penalty, no_repeat_ngram_size, compute_type):
        if not T5Decoder.supports(model):
            raise ValueError(f"--engine ctranslate2 supports T5 models, not {model.config.model_type}")
        if model.device.type != "cpu":
            raise ValueError("--engine ctranslate2 runs on the CPU only; add --device cpu")
        # With a decoder given, none of ours is made; CTranslate2 decodes by itself.
        super().__init__(model, max_length, min_length, no_repeat_ngram_size, decoder=self)
        if len(self.end_tokens) != 1 or len(self.suppressed) or any(self.forced.values()):
            raise ValueError("--engine ctranslate2 supports one end token, and no forced or suppressed tokens")
        self.settings = {
            "beam_size": num_beams,
            "num_hypotheses": num_beams,
            "length_penalty": length_penalty,
            "max_decoding_length": max_length - 1,  # Without the start token.
            "min_decoding_length": max(0, min_length - 1),
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "max_input_length": 0,  # Documents are cut already.
            "return_scores": True,
            "return_end_token": True,
        }
        self.translator = self._convert(model, compute_type)

    def _convert(self, model, compute_type):
        """The Translator of `model`, in whose vocabulary a token's name is its number, such as "17"."""
        try:
            import ctranslate2
            from ctranslate2.converters.transformers import T5Loader
        except ImportError:
            raise UserError(f"--engine ctranslate2 needs the package ctranslate2; pip install {PACKAGE}") from None
        spec = T5Loader().get_model_spec(model.float())
        vocabulary = [str(token) for token in range(model.config.vocab_size)]
        spec.register_source_vocabulary(vocabulary)
        spec.register_target_vocabulary(vocabulary)
        spec.config.bos_token = spec.config.decoder_start_token = str(self.start_token)
        spec.config.eos_token, spec.config.unk_token = str(int(self.end_tokens)), str(self.pad_token)
        spec.validate()
        spec.optimize()
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            return ctranslate2.Translator(folder, compute_type=compute_type, intra_threads=torch.get_num_threads())

    def encode(self, input_ids, attention_mask):
        return None  # CTranslate2 encodes and searches at once.

    def __call__(self, input_ids, attention_mask, encoded=None):
        """The Candidates of a batch of documents. input_ids, attention_mask: int64 [documents, length], padded at the
        end."""
        lengths = attention_mask.sum(1).tolist()
        sources = [list(map(str, ids[:length])) for ids, length in zip(input_ids.tolist(), lengths, strict=True)]
        found = self.translator.translate_batch(sources, **self.settings)
        hypotheses = [hypothesis for each in found for hypothesis in each.hypotheses]
        log_probs = self._log_probs([source for source in sources for _ in found[0].hypotheses], hypotheses)
        longest = 1 + max(map(len, hypotheses))
        tokens = torch.full((len(hypotheses), longest), self.pad_token)
        tokens[:, 0] = self.start_token
        for row, hypothesis in zip(tokens, hypotheses, strict=True):
            row[1 : 1 + len(hypothesis)] = torch.tensor(list(map(int, hypothesis)))
        shape = len(sources), -1
        return Candidates(
            tokens.view(*shape, longest),
            torch.tensor([each.scores for each in found]),
            torch.tensor(log_probs, dtype=widest_float(self.device)).view(shape),
            torch.tensor(list(map(len, hypotheses))).view(shape),
        )

    def _log_probs(self, sources, hypotheses):
        """The model's own log-probability of each hypothesis, regardless of what was forbidden in the search; in int8,
        that of the quantized model."""
        end = str(int(self.end_tokens))
        bare = [[token for token in hypothesis if token != end] for hypothesis in hypotheses]
        scored = self.translator.score_batch(sources, bare, max_input_length=0)  # Scores an end token after each.
        return [sum(each.log_probs[: len(own)]) for each, own in zip(scored, hypotheses, strict=True)]
