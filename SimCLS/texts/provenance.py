"""The provenance of candidates and samples: provenance.json in their folder, with a digest to tell them apart."""

import hashlib
import json

from harness.files import write_json

FILE = "provenance.json"
# Keys for human readers; they do not affect the digest.
NAMES = ("generator_name", "text_name", "candidates", "documents")


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
    found = read(folder)
    said = (found or {}).keys() - {"digest"}
    if not said or any(found[key] != each for key, each in json.loads(json.dumps(described)).items() if key in said):
        write_json(folder / FILE, described)


def read(folder):
    """The dict that `write` wrote to `folder`; None if there is none, as in published samples."""
    try:
        described = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return described if isinstance(described, dict) and "digest" in described else None


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
    for theirs in sorted({each.get("rouge_tokens") or rouge_tokens for each in (made or {}, scorer)} - {rouge_tokens}):
        wrong.append(f"the scorer or the samples were made with --rouge_tokens {theirs}, not {rouge_tokens}")
    return wrong
