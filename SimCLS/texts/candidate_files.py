"""The candidate text files of one split, collected batch by batch, so that a killed run resumes where it stopped.

While a split is generated, each process appends its batches to `{split}.rank{r}.partial`: a first line with the
settings, then one JSON line per batch. Once all batches are there, the seven text files are written atomically, and
last `{split}.settings.json`, which shows a later run that nothing is left to do.
"""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

from utils import read_lines

from harness.endings import UserError
from harness.files import atomic_write, write_json
from texts import provenance
from texts.sentences import ptb_tokenize

# Settings that older files do not have; where one is missing, it is not compared.
NEWER = ("tokenizer", "tokenizer_settings", "config")
FILES = ("source", "target", "out", "source.tokenized", "target.tokenized", "out.tokenized", "likelihood")
DIGESTS = "files"  # In a split's settings file: a digest of each text file. (Likelihoods are rounded, but not exact.)


class CandidateFiles:
    """The files of one split in `folder`, for one process of `world`.

    settings: dict of plain JSON values, everything that the candidates depend on (the batch size is not part of it).
    """

    def __init__(self, folder, split, settings, world):
        self.folder, self.split, self.settings, self.world = folder, split, settings, world
        self.settings_path = folder / f"{split}.settings.json"
        self.own_partial = folder / f"{split}.rank{world.rank}.partial"

    def complete(self):
        """Whether all files exist and were made with these settings."""
        found = _read_json(self.settings_path)
        same = isinstance(found, dict) and not self.changed(found)
        return same and all((self.folder / f"{self.split}.{name}").is_file() for name in FILES)

    def changed(self, found):
        """The settings that differ in the dict `found`, in words."""
        found = {name: self.settings[name] for name in NEWER if name in self.settings} | found
        names = (found.keys() | self.settings.keys()) - {DIGESTS}
        return ", ".join(sorted(name for name in names if found.get(name) != self.settings.get(name)))

    def prepare(self):
        """In the main process: remove leftovers of killed writes. UserError if there are candidates with other or
        unknown settings."""
        partials = {path: next(_read_lines(path), None) for path in self._partials()}
        settings, told_by = _read_json(self.settings_path), [self.settings_path]
        if not any(isinstance(found, dict) for found in partials.values()):
            told_by += [self.folder / f"{self.split}.{name}" for name in FILES]
        if not isinstance(settings, dict) and any(path.exists() for path in told_by):
            raise UserError(
                f"{self.folder} has {self.split} candidates whose {self.settings_path.name} is missing or damaged; "
                "choose another --output_dir, or move the candidates away"
            )
        for found in (settings, *partials.values()):
            changed = self.changed(found) if isinstance(found, dict) else ""
            if changed:
                raise UserError(
                    f"{self.folder} has {self.split} candidates made with other settings ({changed}); choose "
                    "another --output_dir, or delete that folder"
                )
        for name in (self.split, provenance.FILE):
            for leftover in self.folder.glob(f".{name}.*.tmp"):
                leftover.unlink()
        for path, found in partials.items():
            if found is None:  # Killed before its first line was complete.
                path.unlink()

    def finished(self):
        """The places of the documents that have candidates from any process, a set of int."""
        return {place for record in self._records() for place in record["places"]}

    def open(self):
        """The file that `add` writes to, opened for appending after the last complete line."""
        self.own_partial.touch()
        file = open(self.own_partial, "r+b")  # noqa: SIM115 (the caller closes it)
        size = file.read().rfind(b"\n") + 1
        file.truncate(size)
        file.seek(size)
        if size == 0:
            _append(file, self.settings)
        return file

    def add(self, file, places, documents, candidates):
        """Write one batch. places: of its documents in the split. documents: list of Document. candidates: a list of
        Candidate for each, best first."""
        texts = [[candidate.text for candidate in some] for some in candidates]
        record = {
            "places": places,
            "source.tokenized": [[ptb_tokenize(document.text)] for document in documents],
            "target.tokenized": [[ptb_tokenize(document.summary)] for document in documents],
            "out": texts,
            "out.tokenized": [[ptb_tokenize(text) for text in some] for some in texts],
            "likelihood": [[f"{each.log_prob:.6f} {each.tokens}" for each in some] for some in candidates],
        }
        _append(file, record)

    def publish(self, documents):
        """Write the text files of all documents, a list of Document, from the batches, and delete the batches."""
        self.settings_path.unlink(missing_ok=True)
        plain = {"source": [[document.text] for document in documents]}
        plain["target"] = [[document.summary] for document in documents]
        for name in FILES:
            # One file at a time, to save memory with a large data set.
            lines = plain.get(name) or self._collect(name, len(documents))
            with atomic_write(self.folder / f"{self.split}.{name}", "w") as file:
                file.writelines(f"{line}\n" for some in lines for line in some)
        digests = {name: provenance.digest_files([self.folder / f"{self.split}.{name}"]) for name in FILES[:-1]}
        write_json(self.settings_path, self.settings | {DIGESTS: digests})
        for path in self._partials():
            path.unlink()

    def _collect(self, name, documents):
        lines = [None] * documents
        for record in self._records():
            for place, some in zip(record["places"], record[name], strict=True):
                lines[place] = some
        if None in lines:
            raise UserError(
                f"{self.folder}: a batch of {self.split} is missing after the run; run gen_candidate.py again"
            )
        return lines

    def _partials(self):
        return sorted(self.folder.glob(f"{self.split}.rank*.partial"))

    def _records(self):
        for path in self._partials():
            lines = _read_lines(path)
            next(lines, None)
            yield from lines


def _append(file, value):
    file.write(json.dumps(value).encode() + b"\n")
    file.flush()


def _read_lines(path):
    """Yield the JSON values of complete lines. Lines torn by a crash are skipped: their batches are made again."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue


def _read_json(path):
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------------------------- to read them again


class TextFiles(NamedTuple):
    """The three files of a split, plain or tokenized."""

    source: Path
    target: Path
    out: Path


class Lines(NamedTuple):
    """One document's lines in those files; `candidates` is a list."""

    source: str
    target: str
    candidates: list


def edited_files(src_dir, split):
    """The names of a split's files that are no longer as gen_candidate.py wrote them, list of str. None are if other
    programs wrote them, or if its version kept no digests."""
    settings = _read_json(src_dir / f"{split}.settings.json")
    digests = settings.get(DIGESTS) if isinstance(settings, dict) else None
    if not isinstance(digests, dict):
        return []
    paths = {name: src_dir / f"{split}.{name}" for name in FILES}
    return [
        path.name
        for name, path in paths.items()
        if not path.exists() or digests.get(name) not in (None, provenance.digest_files([path]))
    ]


def likelihood_file(src_dir, split):
    """The Path of a split's likelihoods, or None if there is no such file, as with candidates made elsewhere."""
    path = src_dir / f"{split}.likelihood"
    return path if path.exists() else None


def read_likelihoods(path, cand_num):
    """Yield, for each document, the list of [log-probability, tokens] of its candidates; if `path` is None, yield None
    without end. UserError, naming the line, for an invalid line."""
    if path is None:
        yield from itertools.repeat(None)
    numbered = enumerate(read_lines(path), 1)
    while group := list(itertools.islice(numbered, cand_num)):
        yield [_likelihood(path, *line) for line in group]


def _likelihood(path, number, line):
    try:
        log_prob, tokens = line.split(" ")
        log_prob, tokens = float(log_prob), int(tokens)
    except ValueError:
        log_prob, tokens = math.nan, 0
    if not math.isfinite(log_prob) or tokens < 1:
        raise UserError(
            f"{path}, line {number}: {line!r} is not a log-probability and a token count; run gen_candidate.py again"
        )
    return [log_prob, tokens]


def text_files(src_dir, split):
    """The (plain, tokenized) TextFiles of a split, which need not exist."""
    plain = TextFiles(*(src_dir / f"{split}.{field}" for field in TextFiles._fields))
    return plain, TextFiles(*(path.with_name(path.name + ".tokenized") for path in plain))


def check_counts(plain, tokenized, likelihood, cand_num):
    """The number of documents; UserError if a file cannot be read, or if the line counts do not match `cand_num`."""
    of_candidates = [path for path in (plain.out, tokenized.out, likelihood) if path]
    counts = {path: sum(1 for _ in read_lines(path)) for path in (*plain, *tokenized, *of_candidates)}
    documents = counts[plain.source]
    if documents == 0:
        raise UserError(f"{plain.source} is empty; it needs one document per line")
    needed = dict.fromkeys(counts, documents) | dict.fromkeys(of_candidates, documents * cand_num)
    wrong = [
        f"{path.name} has {count} lines, not {needed[path]}" for path, count in counts.items() if count != needed[path]
    ]
    if wrong:
        raise UserError(
            f"{plain.source.parent}: the line counts do not match the {documents} lines of {plain.source.name} and "
            f"--num_cands {cand_num}: {', '.join(wrong)}; give the --num_cands of gen_candidate.py, or run it again"
        )
    return documents


def read_split(files, cand_num):
    """Yield the Lines of each document. ValueError for missing or additional lines, which `check_counts` rules out."""
    candidates = zip(*[read_lines(files.out)] * cand_num, strict=True)
    for source, target, group in zip(read_lines(files.source), read_lines(files.target), candidates, strict=True):
        yield Lines(source, target, list(group))
