"""Build sample.csv (columns abstract, title) from the docstrings of Python and the installed packages.

    python3 texts/sample_data.py

A docstring with a one-sentence summary and a longer description makes one pair: the document is a heading and the
description, as on a page of reference documentation ("Series sort values: ..."); the sentence is its reference summary.
This is real text without a download. The modules are parsed, never imported. The rows are ordered by package, file and
line, so that the same installed versions always give the same file.
"""

import ast
import csv
import importlib.util
import multiprocessing
import re
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from harness import arguments, endings, machine
from harness.endings import UserError
from harness.files import atomic_write

SAMPLE = Path(__file__).resolve().parent.parent / "sample.csv"

# Packages of the requirements that give many pairs per second of parsing.
PACKAGES = """
    numpy scipy pandas matplotlib sklearn torch transformers nltk networkx torchvision accelerate huggingface_hub
    tensorboard PIL joblib
"""
# Tests, copies of other packages, and parts that take long to parse for few pairs or repetitive text.
SKIPPED_FOLDERS = (
    "tests test testing site-packages idlelib encodings _vendor models _inductor _dynamo _functorch fx onnx"
)

SUMMARY_WORDS = range(3, 26)
DESCRIPTION_WORDS = range(15, 401)
SHARED_WORDS = 0.4

# Sections with prose in the reST, Google and NumPy styles; the others list functions, code or literature.
_PROSE_SECTIONS = frozenset([
    "args", "arguments", "parameters", "params", "attributes", "return", "returns", "yield", "yields", "raises", "note",
    "notes", "warning", "warnings", "keyword-arguments", "other-parameters", "input", "inputs", "output", "outputs",
])  # fmt: skip
_OTHER_SECTIONS = frozenset(
    ["see-also", "example", "examples", "example-usage", "usage", "reference", "references", "methods", "shape"]
)
_RULE = re.compile(r"[-=~^*+_#| ]{3,}$")
_NO_PROSE = (">>>", "...", "```", "|", "@", "$", "\\", "In [", "Out[")
_MARKUP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r":(?:param|type|returns?|rtype|raises)\s*(?:[\w.]+ )?([*\w]*)\s*:", r"\1:"),  # :param int size:
        (r":[\w:+-]+:`~?\.?(?:[^`<]*<)?([^`<>]*)>?`", r"\1"),  # :class:`~torch.Tensor`
        (r"`([^`<]*?)\s*<[^`>]*>`_{0,2}", r"\1"),  # `text <address>`_
        (r"\[([^\]]*)\]\([^)]*\)", r"\1"),  # [text](address)
        (r"`+([^`]*)`+_{0,2}", r"\1"),
        (r"(?<!\w)\*{1,2}([^*\s][^*]*)\*{1,2}(?!\w)", r"\1"),
        (r"\[\d+\]_?|https?://\S+", ""),
        (r"^(\*{0,2}\w+)\s*\([^)]*\)\s*:", r"\1:"),  # size (int, optional):
        (r"^\W+(?=\w)|\s*:$", ""),
        (r"\s+", " "),
    )
]


def get_args_parser():
    parser = arguments.OneLineParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=SAMPLE, help="CSV file to write")
    return parser


def main():
    args = get_args_parser().parse_args()
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder; give a file, such as {args.output / SAMPLE.name}")
    if args.output.exists() and args.output.resolve() != SAMPLE:
        raise UserError(f"--output {args.output} already exists; choose another, or delete it")
    print(f"{build_sample(args.output)} pairs in {args.output}")


def ensure_sample():
    """The Path of SimCLS/sample.csv, which is built if it does not exist. SystemExit if that fails."""
    if not SAMPLE.is_file():
        print(f"building {SAMPLE.name} from the docstrings of the installed packages", file=sys.stderr)
        # In an interpreter of its own: worker processes import the main script anew, and this one's may import torch.
        code = subprocess.run([sys.executable, __file__], stdout=subprocess.DEVNULL).returncode
        if code > 0:
            sys.exit(code)  # It has said why.
        if code < 0:
            raise UserError(f"building {SAMPLE} was ended by signal {-code}; run the same command again")
    return SAMPLE


def build_sample(path):
    """Write the CSV file and return its number of pairs. UserError if no docstrings are found."""
    # Spawned: a fork of a process with torch's threads may deadlock.
    with multiprocessing.get_context("spawn").Pool(min(4, machine.usable_cores())) as pool:
        found = pool.map(file_pairs, list(python_files()), chunksize=20)
    pairs = list(without_repeats(pair for pairs in found for pair in pairs))
    if not pairs:
        raise UserError("no docstrings found: the sources of Python's library and the packages are not installed")
    with atomic_write(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows([("abstract", "title"), *pairs])
    return len(pairs)


def python_files():
    """Yield the Path of every module to read, in a fixed order."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    specs = [importlib.util.find_spec(package) for package in PACKAGES.split()]
    roots += [Path(spec.origin).parent for spec in specs if spec and spec.origin]
    skipped = set(SKIPPED_FOLDERS.split())
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            if not skipped.intersection(path.relative_to(root).parts[:-1]):
                yield path


def file_pairs(path):
    """The (document, summary) pairs of one module, in the order of its lines."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in their strings
            tree = ast.parse(source) if '"""' in source or "'''" in source else ast.Module([], [])
    except (SyntaxError, ValueError, OSError):
        return []
    module = path.parent.name if path.stem == "__init__" else path.stem
    found = (docstring_pair(docstring, heading) for heading, docstring in _docstrings(tree, module))
    return [pair for pair in found if pair]


def _docstrings(node, heading):
    """Yield (heading, docstring) for a module, its classes and its functions; `Axes set position` for a method."""
    docstring = ast.get_docstring(node)
    if docstring and "\n\n" in docstring:
        yield heading, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = " ".join(re.sub(r"([a-z])([A-Z])", r"\1 \2", child.name).replace("_", " ").split())
            hidden = child.name.startswith("__")
            outer = heading if isinstance(node, ast.ClassDef) else ""
            yield from _docstrings(child, outer if hidden else f"{outer} {name}".strip())


def docstring_pair(docstring, heading):
    """The (document, summary) of a docstring, or None if it is not usable.

    The description has 15 to 400 words (longer ones are cut), and the summary 3 to 25. At least 40 % of the summary's
    longer words must occur in the document; otherwise it could only be guessed.
    """
    first, _, rest = docstring.partition("\n\n")
    summary, spill = _first_sentence(_plain(first))
    description = " ".join([spill, *_prose(rest.splitlines())]).split()[: DESCRIPTION_WORDS[-1]]
    document = f"{heading}: {' '.join(description)}"
    if len(summary.split()) not in SUMMARY_WORDS or len(description) not in DESCRIPTION_WORDS:
        return None
    if not (_is_text(summary) and _is_text(document)):
        return None
    wanted = _stems(summary)
    if len(wanted & _stems(document)) < SHARED_WORDS * len(wanted):
        return None
    return document, summary


def without_repeats(pairs):
    """Drop pairs whose summary or beginning of the description repeats an earlier one, ignoring numbers and case.

    Overloads and generated classes repeat each other's text; the test split would contain training documents.
    """
    seen = set()
    for document, summary in pairs:
        description = document.partition(": ")[2]
        keys = {("summary", _letters(summary)), ("description", _letters(" ".join(description.split()[:15])))}
        if not keys & seen:
            yield document, summary
        seen |= keys


def _first_sentence(text):
    match = re.match(r"(.+?[.!?])\s+(?=[A-Z])(.*)", text)
    if match and not re.search(r"\b(e\.g|i\.e|etc|vs|cf|al)\.$", match[1]):
        return match[1], match[2]
    return text, ""


def _prose(lines):
    """The paragraphs of a docstring's body as plain text, without code, tables, rules and listings."""
    paragraphs, skip_deeper_than, in_prose, in_fields = [""], None, True, False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if not text:
            paragraphs.append("")
            continue
        if skip_deeper_than is not None and indent > skip_deeper_than:
            continue
        skip_deeper_than = None
        section = text.rstrip(":").lower().replace(" ", "-")
        ruled = bool(_RULE.match(following.strip()))
        if section in _PROSE_SECTIONS | _OTHER_SECTIONS and (ruled or text.endswith(":")):
            paragraphs.append("")
            in_prose = section in _PROSE_SECTIONS
            # NumPy style: `name : type` at the margin, and below it the indented description.
            in_fields = ruled and not section.startswith(("note", "warning"))
        elif not in_prose or _RULE.match(text) or text.startswith(_NO_PROSE) or (in_fields and indent == 0):
            continue
        elif text.startswith(".. ") or text.endswith("::"):
            skip_deeper_than = indent
            if not text.startswith(".. "):
                paragraphs[-1] += " " + text.rstrip(":")
        elif re.match(r"[*\w]+ ?\([^)]*\) ?:|:\w+ ", text):
            paragraphs.append(text)  # a field of the Google or reST style
        else:
            paragraphs[-1] += " " + text
    return [text for text in map(_plain, paragraphs) if len(text.split()) > 2]


def _plain(text):
    text = text.strip()
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _is_text(text):
    """Whether nearly all characters are letters or spaces, and none is outside ASCII."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return text.isascii() and text.isprintable() and letters > 0.88 * len(text)


def _stems(text):
    """The first five letters of all words of four or more letters: enough to see that two texts share a word."""
    return {word[:5] for word in re.findall(r"[a-z]{4,}", text.lower())}


def _letters(text):
    return re.sub(r"[\W\d_]+", " ", text.lower())


if __name__ == "__main__":
    endings.run(main)
