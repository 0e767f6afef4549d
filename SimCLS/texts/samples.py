"""Samples: documents with their scored candidates, which preprocess.py writes to one file `{i}.json` per document.

The format is that of the published SimCLS and BRIO samples: a dict with KEYS. Ours also have "likelihood", if known:
[log-probability, tokens] of each candidate by the generator.
"""

import json
import os
import re
from pathlib import Path

from harness.endings import UserError
from harness.files import is_utf8
from harness.shapes import WHOLE, each, fault, is_number, maybe
from texts import provenance
from texts.candidate_files import Lines
from texts.documents import Document
from texts.rouge_scores import mean_score, score
from texts.sentences import ptb_tokenize

FILE_NAME = re.compile(r"[0-9]{1,200}\.json")  # The file name of a sample.
KEYS = ("article", "abstract", "article_untok", "abstract_untok", "candidates", "candidates_untok")


def _pair(first, second):
    return lambda value: isinstance(value, list) and len(value) == 2 and first[1](value[0]) and second[1](value[1])


def _are_sentences(value):
    return isinstance(value, list) and all(isinstance(sentence, str) and is_utf8(sentence) for sentence in value)


SENTENCES = ("a list of sentences in UTF-8", _are_sentences)  # JSON also allows "\ud800", which no tokenizer accepts.
FIGURE = ("a number", lambda value: is_number(value) and abs(value) < 1e30)  # So that sums of them are numbers, too.
SAMPLE = dict.fromkeys(KEYS[:4], SENTENCES)
SAMPLE |= dict.fromkeys(KEYS[4:], each(list, ("[sentences, score], in UTF-8", _pair(SENTENCES, FIGURE))))
SAMPLE["likelihood"] = maybe(each(list, ("[log-probability, tokens]", _pair(FIGURE, WHOLE))))


def sample_files(folder):
    """The Paths of the samples of `folder`, in the order of their numbers; other files are ignored.

    UserError if the folder does not exist, has no samples, or has another number of samples than its provenance says.
    """
    try:
        numbered = [(int(name[:-5]), name) for name in os.listdir(folder) if FILE_NAME.fullmatch(name)]
    except OSError as error:
        raise UserError(f"cannot read the sample folder {folder}: {error.strerror}; run preprocess.py") from None
    if not numbered:
        raise UserError(f"the sample folder {folder} has no samples (0.json, 1.json, ...); run preprocess.py")
    twice = len(numbered) - len({number for number, _ in numbered})
    if twice:  # As 0.json and 00.json.
        raise UserError(f"{folder} has {twice} samples with the number of another in their file name; rename them")
    made = (provenance.read(Path(folder)) or {}).get("documents")
    if made not in (None, len(numbered)):  # preprocess.py was stopped while it renamed them.
        raise UserError(f"{folder} has {len(numbered)} of its {made} samples; run the same preprocess.py command again")
    return [Path(folder) / name for _, name in sorted(numbered)]


def provenance_of(folder):
    """The provenance of a sample folder; if it has none, one from the names and sizes of its samples."""
    files = sample_files(folder)
    made_of = provenance.read(folder)
    return made_of or provenance.describe(files=[[path.name, path.stat().st_size] for path in files])


def check_training(folder, rouge_tokens, say=print):
    """[the provenance of the training samples in `folder`, that of the validation samples], two dicts. Warns if their
    candidates were made differently. UserError if both are from the same documents, which would choose the weights, or
    if their scores are of other tokens than `rouge_tokens`."""
    made_of = [provenance_of(folder / split) for split in ("train", "val")]
    for split, made in zip(("train", "val"), made_of, strict=True):
        theirs = made.get("rouge_tokens", rouge_tokens)
        if theirs != rouge_tokens:
            raise UserError(f"{folder / split} was made with --rouge_tokens {theirs}; give the same here")
    if provenance.same_documents(*made_of):
        split = f" ({made_of[0]['split']})" if "split" in made_of[0] else ""
        raise UserError(
            f"{folder / 'train'} and {folder / 'val'} were made from the same documents{split}; "
            "make each with its own --split of preprocess.py"
        )
    different = provenance.differences(*(made.get("candidates") for made in made_of))
    if different:
        say(f"warning: {folder / 'train'} and {folder / 'val'} have candidates made with other settings ({different})")
    return made_of


def read_sample(path):
    """The sample in the file `path`, a dict with KEYS. UserError, naming the file, if it is not valid."""
    try:
        sample = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the sample {path}: {error.strerror}") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise UserError(f"the sample {path} is not JSON ({error}); make it again with preprocess.py") from None
    problem = fault(sample, SAMPLE) or _wrong_counts(sample) or _wrong_pairs(sample)
    if problem:
        raise UserError(f"{path} is not a sample: {problem}; make it again with preprocess.py")
    return sample


def as_document(sample):
    """The Document of a sample."""
    return Document(" ".join(sample["article_untok"]), " ".join(sample["abstract_untok"]))


def _wrong_counts(sample):
    """The problem with the lengths of a sample's lists of candidates, in words, or None."""
    counts = {name: len(sample[name] or ()) for name in (*KEYS[4:], "likelihood") if name in sample}
    if len(set(counts.values())) > 1:
        return "it has " + ", ".join(f"{count} {name}" for name, count in counts.items())
    return None if counts["candidates"] else "it has no candidates"


def _wrong_pairs(sample):
    """The problem with candidates that are not in the order of `candidates_untok`, in words, or None."""
    pairs = zip(*(sample[name] for name in KEYS[4:]), strict=True)
    if any(score != other for (_, score), (_, other) in pairs):
        return "the scores in candidates and candidates_untok differ, so their order may, too"
    return None


# ------------------------------------------------------------------------------------------------- to make them


def score_sample(plain, tokenized, split, tokens="standard", likelihood=None):
    """(the sample of one document, a dict of JSON values; the ROUGE of its candidates, as from `score`)

    plain, tokenized: Lines. split: text -> list of sentences. likelihood: [log-probability, tokens] of each candidate,
    or None, which leaves the key out. The plain text loses only the white space between sentences.
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
    """The sentences of a tokenized text, lower-cased only after the split, for which capitals matter."""
    return [sentence.lower() for sentence in split(text)]


def as_sample(document, summary, candidates, split, tokens="standard", likelihood=None):
    """The sample that gen_candidate.py and preprocess.py would make, with its candidates' `score` as "rouge".

    split: text -> list of sentences.
    """
    plain = Lines(document, summary, candidates)
    tokenized = Lines(ptb_tokenize(document), ptb_tokenize(summary), [ptb_tokenize(text) for text in candidates])
    sample, rouge = score_sample(plain, tokenized, split, tokens, likelihood)
    return sample | {"rouge": rouge}
