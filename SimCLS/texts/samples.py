"""Samples: a document with its scored candidates, as preprocess.py writes them to `{i}.json`, one file a document.

Those of the published SimCLS and BRIO releases are the same: a dict with KEYS. Ours have "likelihood" too, for each
candidate [log-probability, tokens] by the generator, where that is known.
"""

import json
import os
import re
from pathlib import Path

from harness.endings import UserError
from reporting.shapes import WHOLE, is_number
from texts import provenance
from texts.candidate_files import Lines
from texts.scoring import mean_score, score
from texts.sentences import ptb_tokenize

FILE_NAME = re.compile(r"[0-9]{1,18}\.json")  # Of a sample.
KEYS = ("article", "abstract", "article_untok", "abstract_untok", "candidates", "candidates_untok")


def sample_files(folder):
    """The Paths of the samples of `folder`, in the order of their numbers; other files do not count.

    UserError when there is no such folder or no sample in it, and when it has not as many as its provenance says.
    """
    try:
        numbered = [(int(name[:-5]), name) for name in os.listdir(folder) if FILE_NAME.fullmatch(name)]
    except OSError as error:
        raise UserError(f"cannot read the sample folder {folder}: {error.strerror}; preprocess.py makes it") from None
    if not numbered:
        raise UserError(f"the sample folder {folder} holds no sample 0.json, 1.json, ...; preprocess.py makes them")
    made = (provenance.read(Path(folder)) or {}).get("documents")
    if made not in (None, len(numbered)):  # preprocess.py was stopped while it gave them their names.
        raise UserError(f"{folder} has {len(numbered)} of its {made} samples; the same preprocess.py makes the others")
    return [Path(folder) / name for _, name in sorted(numbered)]


def provenance_of(folder):
    """The provenance of a sample folder; without one, of the names and sizes of its samples."""
    files = sample_files(folder)
    made_of = provenance.read(folder)
    return made_of or provenance.describe(files=[[path.name, path.stat().st_size] for path in files])


def read_sample(path):
    """The sample in the file `path`: a dict with KEYS. UserError that names the file when it is not one."""
    try:
        sample = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the sample {path}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"the sample {path} is not JSON ({error}); make it again with preprocess.py") from None
    problem = _problem(sample)
    if problem:
        raise UserError(f"the sample {path} {problem}; make it again with preprocess.py")
    return sample


def _problem(sample):
    """What is wrong with a sample, or None."""
    if not isinstance(sample, dict):
        return "is no JSON object"
    missing = [key for key in KEYS if key not in sample]
    if missing:
        return f"lacks the key {missing[0]!r}"
    for key in KEYS[:4]:
        if not _is_text(sample[key]):
            return f"has no list of sentences under {key!r}"
    for key in KEYS[4:]:
        if not isinstance(sample[key], list) or not all(map(_is_candidate, sample[key])):
            return f"has no list of [sentences, score] under {key!r}"
    counts = len(sample["candidates"]), len(sample["candidates_untok"])
    if counts[0] != counts[1]:
        return f"has {counts[0]} 'candidates' but {counts[1]} 'candidates_untok'"
    if "likelihood" in sample and not (
        isinstance(sample["likelihood"], list)
        and len(sample["likelihood"]) == counts[0]
        and all(map(_is_likelihood, sample["likelihood"]))
    ):
        return "has no list of [log-probability, tokens] for its candidates under 'likelihood'"
    return None if counts[0] else "has no candidates"


def _is_text(value):
    return isinstance(value, list) and all(isinstance(sentence, str) for sentence in value)


def _is_candidate(value):
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and is_number(value[1])


def _is_likelihood(value):
    return isinstance(value, list) and len(value) == 2 and is_number(value[0]) and WHOLE[1](value[1])


# ------------------------------------------------------------------------------------------------- to make them


def score_sample(plain, tokenized, split, tokens="standard", likelihood=None):
    """(the sample of one document as a dict of JSON values, the ROUGE of its candidates as from `score`)

    plain, tokenized: Lines. split: text -> list of sentences. likelihood: [log-probability, tokens] of each candidate,
    or None, which leaves the key out. Only white space between sentences is lost of the plain text.
    """
    abstract = split_lower(tokenized.target, split)
    candidates = [split_lower(text, split) for text in tokenized.candidates]
    rouge = score(abstract, candidates, tokens)
    scores = mean_score(rouge).tolist()
    candidates_untok = [split(text) for text in plain.candidates]
    sample = {
        "article": split_lower(tokenized.source, split),
        "abstract": abstract,
        "candidates": list(zip(candidates, scores, strict=True)),
        "article_untok": split(plain.source),
        "abstract_untok": split(plain.target),
        "candidates_untok": list(zip(candidates_untok, scores, strict=True)),
    }
    return sample | ({"likelihood": likelihood} if likelihood else {}), rouge


def split_lower(text, split):
    """The sentences of a tokenized text, lower-cased after the split: capitals tell where sentences begin."""
    return [sentence.lower() for sentence in split(text)]


def as_sample(document, summary, candidates, split, tokens="standard", likelihood=None):
    """The sample that gen_candidate.py and preprocess.py would make, and under "rouge" what `rouge_of` returns.

    split: text -> list of sentences.
    """
    plain = Lines(document, summary, candidates)
    tokenized = Lines(ptb_tokenize(document), ptb_tokenize(summary), [ptb_tokenize(text) for text in candidates])
    sample, rouge = score_sample(plain, tokenized, split, tokens, likelihood)
    return sample | {"rouge": rouge}


def rouge_of(sample, tokens="standard"):
    """The candidates' ROUGE-1, -2 and -Lsum F-measure, float64 [candidates, 3]."""
    return score(sample["abstract"], [sentences for sentences, _ in sample["candidates"]], tokens)
