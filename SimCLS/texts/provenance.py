"""The provenance of candidates and samples: provenance.json in their folder, with a digest to tell them apart."""

import hashlib
import json

from harness.endings import UserError
from harness.files import write_json
from harness.shapes import COUNT, NUMBER, TEXT, WHOLE, each, fault, maybe

FILE = "provenance.json"
# Keys for human readers; they do not affect the digest.
NAMES = ("generator_name", "text_name", "candidates", "documents")
NEWER = ("config",)  # Keys that older files lack.
# What they look like; each may lack some of it.
_SEARCH = dict.fromkeys(("num_beams", "num_groups", "num_samples", "max_length"), maybe(WHOLE))
_SEARCH |= dict.fromkeys(("min_length", "no_repeat_ngram_size", "seed"), maybe(COUNT)) | {"engine": maybe(TEXT)}
_SEARCH |= dict.fromkeys(("diversity_penalty", "length_penalty", "top_p"), maybe(NUMBER))
_CANDIDATES = dict.fromkeys(("generator_name", "generator", "config", "text_name", "text"), maybe(TEXT))
_CANDIDATES |= {"search": maybe(_SEARCH | {"searches": maybe(each(list, _SEARCH))}), "max_source_length": maybe(WHOLE)}
SHAPE = dict.fromkeys(("digest", "split", "rouge_tokens", "sentences"), maybe(TEXT)) | _CANDIDATES
SHAPE |= {"cand_num": maybe(WHOLE), "documents": maybe(COUNT), "candidates": maybe(_CANDIDATES)}


def digest(value):
    """A digest of plain JSON values, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_files(paths):
    """A digest of the contents of files."""
    every = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            every.update(hashlib.file_digest(file, "sha256").digest())
    return every.hexdigest()[:16]


def describe(**what):
    """`what`, a dict of plain JSON values, with the "digest" of all of it except NAMES."""
    return {"digest": digest({key: value for key, value in what.items() if key not in NAMES})} | what


def write(folder, described):
    """Write `described` to `folder`. An equal file is left alone, and so is an older one that says less: what it does
    not say is unknown, and what was made of it has its digest."""
    found, plain = _read(folder) or {}, json.loads(json.dumps(described))
    older = {key: value for key, value in plain.items() if key not in NEWER}
    if found != plain and found | {"digest": None} != older | {"digest": None}:
        write_json(folder / FILE, described)


def read(folder):
    """The dict that `write` wrote to `folder`; None if there is none, as in published samples. UserError if it has been
    changed into something else."""
    described = _read(folder)
    wrong = described and fault(described, SHAPE)
    if wrong:
        raise UserError(
            f"{folder / FILE} does not say what made these files ({wrong}); copy it again, or make them anew"
        )
    return described


def _read(folder):
    try:
        described = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return described if isinstance(described, dict) and "digest" in described else None


def origin(made):
    """The provenance of the candidates of samples with the provenance `made`; None if it does not say how they were
    made."""
    candidates = (made or {}).get("candidates") or {}
    known = all(candidates.get(name) is not None for name in ("generator_name", "generator", "search"))
    known = known and candidates.get("max_source_length") and candidates["search"].get("searches", True)
    return candidates if known else None


def differences(ours, theirs):
    """The keys that differ between two provenances, in words; "" if none does, or if one of them is None.

    Which share of the text was used does not count.
    """
    if not ours or not theirs:
        return ""
    known = (ours.keys() & theirs.keys()) - {"digest", *NAMES}
    return ", ".join(sorted(key for key in known if ours[key] != theirs[key]))


def same_documents(ours, theirs):
    """Whether two provenances of samples show that these are the same samples, or from the same split of the same text;
    False if unknown."""
    if not ours or not theirs:
        return False
    if ours.get("digest") is not None and ours["digest"] == theirs.get("digest"):
        return True
    if ours.get("split") is None or ours["split"] != theirs.get("split"):
        return False
    texts = [(each.get("candidates") or {}).get("text", each.get("files")) for each in (ours, theirs)]
    return texts[0] is not None and texts[0] == texts[1]


def check_belonging(made, scorer, rouge_tokens):
    """A list of warnings if the samples are not suitable for a scorer, or for ROUGE of these tokens.

    made: the provenance of the samples, or None. scorer: the scorer's description, of which "samples" is the provenance
    of its training samples, "validation" that of those that chose its weights, and "earlier_samples" a list of those of
    the scorers that it started from.
    """
    trained = scorer.get("samples")
    different = differences(*((each or {}).get("candidates") for each in (made, trained)))
    wrong = []
    if different:
        wrong.append(f"the scorer was trained on candidates made with other settings ({different}) than these")
    if any(same_documents(made, each) for each in (trained, *scorer.get("earlier_samples", ()))):
        wrong.append("the scorer was trained on the documents judged here; the results do not apply to other documents")
    if same_documents(made, scorer.get("validation")):
        wrong.append("the scorer's weights were chosen by the documents judged here; the results flatter it")
    for theirs in sorted({what.get("rouge_tokens") or rouge_tokens for what in (made or {}, scorer)} - {rouge_tokens}):
        wrong.append(f"the scorer or the samples were made with --rouge_tokens {theirs}, not {rouge_tokens}")
    return wrong
