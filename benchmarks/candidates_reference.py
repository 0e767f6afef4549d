"""The reference side of candidates.py: generates candidates on request, in the interpreter that runs this script.

With transformers 4.56 it calls `generate`; with versions that have no group beam search it calls `plain_search`, the
same algorithm reimplemented on the library's modules. Reads one JSON request per line from stdin, {"model": folder,
"batches": list of batches of lists of token ids, "pad_to": int or null, "num_cands", "max_length"}, and writes one JSON
answer per line to stdout, {"seconds", "tokens": a list of candidates per document}. The first line of output is
{"name"}.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import torchvision_compat  # noqa: F401  # isort: skip (before transformers)

import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

DIVERSITY_PENALTY = 1.0
HAS_GROUP_BEAM_SEARCH = transformers.__version__.startswith("4.56.")


def main():
    how = "generate" if HAS_GROUP_BEAM_SEARCH else "a plain restatement"
    answer({"name": f"transformers {transformers.__version__}, {how}"})
    models = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["model"]
        if name not in models:
            model = transformers.AutoModelForSeq2SeqLM.from_pretrained(name)
            models[name] = model.float().eval()  # By default, transformers 5 keeps the precision of the file.
        started = time.perf_counter()
        tokens = [generate(models[name], batch, request) for batch in request["batches"]]
        seconds = time.perf_counter() - started
        answer({"seconds": seconds, "tokens": [candidates for batch in tokens for candidates in batch]})


def answer(value):
    print(json.dumps(value), flush=True)


def generate(model, batch, request):
    """The candidates of one batch: per document, a list of lists of token ids."""
    length = request["pad_to"] or max(map(len, batch))
    pad = model.config.pad_token_id
    input_ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids in batch])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch])
    beams, max_length = request["num_cands"], request["max_length"]
    if HAS_GROUP_BEAM_SEARCH:
        tokens = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            num_beams=beams,
            num_beam_groups=beams,
            num_return_sequences=beams,
            diversity_penalty=DIVERSITY_PENALTY,
            max_length=max_length,
        )
    else:
        tokens = plain_search(model, input_ids, attention_mask, beams, max_length)
    return tokens.view(len(batch), beams, -1).tolist()


@torch.no_grad()
def plain_search(model, input_ids, attention_mask, beams, max_length):
    """Diverse beam search with one group per beam, as in transformers 4.56: every beam has a copy of all states.

    Returns int64 [documents * beams, max_length], best first, padded after the end token.
    """
    config, documents = model.generation_config, len(input_ids)
    hidden = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
    hidden, mask = hidden.repeat_interleave(beams, dim=0), attention_mask.repeat_interleave(beams, dim=0)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    tokens = torch.full((documents * beams, max_length), config.pad_token_id)
    tokens[:, 0] = config.decoder_start_token_id
    scores, ended = torch.zeros(documents * beams), [None] * (documents * beams)
    for length in range(1, max_length):
        output = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=mask,
            decoder_input_ids=tokens[:, length - 1 : length],
            past_key_values=cache,
            use_cache=True,
        )
        log_probs = output.logits[:, -1].float().log_softmax(-1)
        forbid(log_probs, tokens[:, :length], config)
        forced = length == max_length - 1 and config.forced_eos_token_id is not None
        if forced:
            log_probs = torch.full_like(log_probs, float("-inf"))
            log_probs[:, config.forced_eos_token_id] = 0
        for row in range(documents * beams):
            if ended[row] is not None:
                continue
            earlier = tokens[row - row % beams : row, length]
            times_taken = torch.bincount(earlier, minlength=log_probs.shape[1])
            penalised = log_probs[row] - (0 if forced else DIVERSITY_PENALTY) * times_taken
            best = (penalised + scores[row]).topk(2)
            end_first = int(best.indices[0]) == config.eos_token_id
            if end_first:
                ended[row] = (float(best.values[0]) / length, length)
            tokens[row, length] = best.indices[int(end_first)]
            scores[row] = best.values[int(end_first)]
        cache.reorder_cache(torch.arange(documents * beams))
        if all(ended):
            break
    return ranked(tokens, scores, ended, beams, config)


def forbid(log_probs, tokens, config):
    """Set to -inf, in place, what a generation config's min_length and no_repeat_ngram_size forbid.

    log_probs: float [rows, vocabulary]. tokens: int64 [rows, length], including the start token.
    """
    length, size = tokens.shape[1], config.no_repeat_ngram_size or 0
    if length < (config.min_length or 0):
        log_probs[:, config.eos_token_id] = float("-inf")
    for row, history in enumerate(tokens.tolist() if size else ()):
        end = history[length - size + 1 :]
        for start in range(length - size + 1):
            if history[start : start + size - 1] == end:
                log_probs[row, history[start + size - 1]] = float("-inf")


def ranked(tokens, scores, ended, beams, config):
    """The beams of each document with their end tokens, best first; of two equal beams, the later comes first."""
    max_length = tokens.shape[1]
    for row, end in enumerate(ended):
        score, length = end or (float(scores[row]) / (max_length - 1), max_length)
        ended[row] = (score, row)
        tokens[row, length:] = config.pad_token_id
        if length < max_length:
            tokens[row, length] = config.eos_token_id
    order = [sorted(ended[start : start + beams], reverse=True) for start in range(0, len(ended), beams)]
    return tokens[[row for some in order for _, row in some]]


if __name__ == "__main__":
    main()
