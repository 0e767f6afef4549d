"""Plain beam search by CTranslate2, an optional package: on a CPU it is faster than ours on small models, and in int8.

benchmarks/beams.py compares the two. Where nothing is forbidden both return the same candidates in float32, up to ties;
where a minimum length or repeated n-grams forbid tokens, CTranslate2 shares their probability out over the others.
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
    """What DiverseBeamSearch is with one group that stops when it has ended `num_beams` hypotheses (early_stopping
    True), for models of T5's kind. It is called in the same way, and returns Candidates, too.

    compute_type: of CTranslate2, such as "float32" or "int8". The rest is as for DiverseBeamSearch.

    Raises ValueError as that does, for models of other kinds, and for what CTranslate2 cannot be told: more than one
    end token, and forced or suppressed ones. UserError where the package is not installed.
    """

    def __init__(self, model, *, num_beams, max_length, min_length, length_penalty, no_repeat_ngram_size, compute_type):
        if not T5Decoder.supports(model):
            raise ValueError(f"--engine ctranslate2 knows models of T5's kind, and not of {model.config.model_type}")
        if model.device.type != "cpu":
            raise ValueError("--engine ctranslate2 is for the CPU; add --device cpu")
        # CTranslate2 decodes by itself: no decoder of ours is made.
        super().__init__(model, max_length, min_length, no_repeat_ngram_size, decoder=self)
        if len(self.end_tokens) != 1 or len(self.suppressed) or any(self.forced.values()):
            raise ValueError("--engine ctranslate2 takes one end token, and none that is forced or suppressed")
        self.settings = {
            "beam_size": num_beams,
            "num_hypotheses": num_beams,
            "length_penalty": length_penalty,
            "max_decoding_length": max_length - 1,  # The start token does not count here.
            "min_decoding_length": max(0, min_length - 1),
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "max_input_length": 0,  # Documents are cut already.
            "return_scores": True,
            "return_end_token": True,
        }
        self.translator = self._convert(model, compute_type)

    def _convert(self, model, compute_type):
        """The Translator of `model`; a token is called by its number, "17"."""
        try:
            import ctranslate2
            from ctranslate2.converters.transformers import T5Loader
        except ImportError:
            raise UserError(f"--engine ctranslate2 needs that package; pip install {PACKAGE}") from None
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
        """The model's own log-probability of each hypothesis, whatever was forbidden when it was found; in int8 that
        of the rounded model."""
        end = str(int(self.end_tokens))
        bare = [[token for token in hypothesis if token != end] for hypothesis in hypotheses]
        scored = self.translator.score_batch(sources, bare, max_input_length=0)  # With an end token behind each.
        return [sum(each.log_probs[: len(own)]) for each, own in zip(scored, hypotheses, strict=True)]
