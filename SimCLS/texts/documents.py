"""Documents and their summaries: the only module that reads, cleans and splits CSV files.

Fine-tuning, generation and evaluation all take their documents from here, so no document can be in the training split
of one stage and in the test split of another.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import re
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from harness.arguments import positive_float
from harness.endings import UserError
from harness.job import read_job

FOLDER = Path(__file__).resolve().parent.parent
SPLIT_SEED = 42
FEWEST_DOCUMENTS = 10
# The first bytes of gzip files, and of bzip2, xz and zip files.
GZIP, PACKED = b"\x1f\x8b", (b"BZh", b"\xfd7zXZ", b"PK\x03\x04")
LONGEST_NAME = 200  # bytes; file systems allow 255, and callers add to the name

# White space and control characters: a superset of what str.splitlines() splits on, since the candidate files have one
# text per line.
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Characters without a picture: zero-width ones, marks of the writing direction, the soft hyphen. One is the byte order
# mark, which may also be inside a file that was concatenated from several.
_INVISIBLE = "\u200b\u2060\ufeff\u200e\u200f\u061c\u00ad" + "".join(
    map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)])
)


class Document(NamedTuple):
    """A document and its reference summary, each on one line."""

    text: str
    summary: str


def add_dataset_arguments(parser, percent=None):
    """Add the arguments that name the documents to an argument parser or group.

    percent: help text of --dataset_percent, which `read_splits` needs; None leaves it out.
    """
    add = parser.add_argument
    add("--dataset_name", "--data_file", default="sample", help="CSV file or data set name")
    add("--doc_col_name", default="abstract", help="column of the documents")
    add("--sum_col_name", default="title", help="column of the summaries")
    if percent:
        add("--dataset_percent", type=positive_float, default=100, help=percent)


def read_splits(args):
    """(path of the arguments' documents, a list of all of them, their splits by `split_documents`, each cut to
    --dataset_percent)."""
    path = find_dataset(args.dataset_name)
    documents = read_documents(path, args.doc_col_name, args.sum_col_name)
    splits = {split: take_percent(part, args.dataset_percent) for split, part in split_documents(documents).items()}
    return path, documents, splits


def read_documents(path, document_column="abstract", summary_column="title"):
    """Read the documents of a .csv or .csv.gz file with a header row, in the order of the rows.

    Texts are cleaned by `clean`. Rows without text or summary, rows that repeat the text of an earlier row, and rows
    that repeat the header are dropped, with a message.

    Returns a list of Document. Raises UserError as `read_columns`, and for fewer than 10 usable documents.
    """
    path = Path(path)
    documents, rows, empty, headers = {}, 0, 0, 0
    for text, summary in read_columns(path, document_column, summary_column):
        text, summary, rows = clean(text), clean(summary), rows + 1
        if is_header((text, summary), (document_column, summary_column)):  # Concatenated files.
            headers += 1
        elif is_header((summary, text), (document_column, summary_column)):
            raise UserError(
                f"{path}: row {rows + 1} is another header, with the columns {document_column!r} and "
                f"{summary_column!r} in each other's place; give these files the same order before you join them"
            )
        elif text and summary:
            documents.setdefault(text, Document(text, summary))
        else:
            empty += 1
    dropped = rows - len(documents)
    if dropped and read_job().rank == 0:
        repeated = f"{dropped - empty - headers} that repeat an earlier text"
        repeated += f", {headers} that repeat the header" * bool(headers)
        print(f"{path}: {dropped} of {rows} rows dropped: {empty} without text or summary, {repeated}", flush=True)
    if len(documents) < FEWEST_DOCUMENTS:
        raise UserError(
            f"{path} has {len(documents)} usable documents (different texts in column {document_column!r}, each with "
            f"a summary in column {summary_column!r}); at least {FEWEST_DOCUMENTS} are needed for three splits"
        )
    return list(documents.values())


def read_columns(path, *columns):
    """Yield the texts in the named columns of a .csv or .csv.gz file, one tuple per row; blank lines are skipped.

    The file is never in memory as a whole. Raises UserError if it cannot be read, is empty or is not UTF-8, if a column
    is missing, and if a row has more or fewer fields than the header. Extra empty fields at the end are allowed if all
    rows have equally many; in a single row, an unquoted comma in a text may have shifted the fields.
    """
    csv.field_size_limit(2**31 - 1)  # A document may be longer than the default limit of 131,072 characters.
    rows, suspects = None, []
    try:
        with _open(path) as file:
            rows = csv.reader(
                io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True, skipinitialspace=True
            )
            header = next((row for row in rows if any(map(clean, row))), None)
            if header is None:
                raise UserError(f"{path} is empty; it needs a header row and rows below it")
            places = _places(path, header, columns)
            width = None  # Fields of the first row.
            for row in filter(None, rows):
                width = width or max(len(row), len(header))
                if (len(row) != width and row != header) or any(row[len(header) :]):
                    raise UserError(
                        f"{path}, line {rows.line_num}: {len(row)} fields, but the header has {len(header)}"
                        + f" and the first row {width}" * (width > len(header))
                        + "; quote fields that contain a comma or a line break"
                    )
                if any(_holds_rows(field, place, len(header)) for place, field in enumerate(row)):
                    suspects.append(rows.line_num)
                yield tuple(row[place] for place in places)
            if suspects and read_job().rank == 0:
                print(f"warning: {path}: {len(suspects)} quoted fields contain lines that look like rows (first: the "
                      f"row that ends in line {suspects[0]}); is a quote missing there?", file=sys.stderr)  # fmt: skip
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}); download it again") from None
    except UnicodeDecodeError as error:
        line = _first_line_without_utf8(path)
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not a CSV file ({error})") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _holds_rows(field, place, width):
    """Whether a field's lines look like the rest of a row, rows of `width` fields, and the start of a row up to the
    field's own `place`, counted from 0: what a missing quote makes of several rows."""
    commas = [line.count(",") for line in field.splitlines()]
    if place == width - 1:  # The last field: every later line is a whole row.
        return width > 1 and len(commas) > 1 and set(commas[1:]) == {width - 1}
    # Two lines with so few commas may be an ordinary text.
    return (
        len(commas) > 2 and commas[0] == width - 1 - place and set(commas[1:-1]) == {width - 1} and commas[-1] == place
    )


def clean(text):
    """`text` on one line: runs of white space and control characters become one space. Spaces and zero-width characters
    at the ends are removed."""
    return _BLANKS.sub(" ", text).strip(" " + _INVISIBLE)


def is_header(fields, columns):
    """Whether the cleaned `fields` of a row are the names of these columns, ignoring case. A name keeps its quotes if a
    byte order mark precedes them, so these are ignored, too."""
    return all(field.strip('"').casefold() == name.casefold() for field, name in zip(fields, columns, strict=True))


def split_documents(documents):
    """Split 80/10/10 into {"train": [...], "val": [...], "test": [...]}, each a list of Document.

    Documents are sorted by a hash of their text. So a document's split does not depend on the order of the rows nor
    (except near the two cuts) on the other documents, and a prefix of a split is a random sample.
    """
    documents = sorted(documents, key=lambda document: _hash(document.text))
    first_cut, second_cut = len(documents) * 80 // 100, len(documents) * 90 // 100
    return {"train": documents[:first_cut], "val": documents[first_cut:second_cut], "test": documents[second_cut:]}


def take_percent(documents, percent):
    """The first `percent` (above 0, at most 100) of a split, at least one document."""
    if not 0 < percent <= 100:
        raise UserError(f"a dataset percentage of {percent} is not above 0 and at most 100")
    return documents[: max(1, len(documents) * Fraction(str(percent)) // 100)]  # Exact: 32.3 has no exact float.


def find_dataset(name):
    """The Path of the CSV file that `name` refers to.

    `name` is a path or a bare name: `clean_covid` is clean_covid.csv or clean_covid.csv.gz in the current folder or in
    SimCLS/. `sample` is SimCLS/sample.csv, which is built if it does not exist. UserError if there is no such file.
    """
    if name == "sample":
        from texts import sample_data

        return sample_data.ensure_sample()
    tried = [Path(name)]
    tried += [folder / f"{name}{suffix}" for folder in (Path(), FOLDER) for suffix in (".csv", ".csv.gz")]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"there is no dataset {name!r}; tried the files {', '.join(map(str, tried))}")


def safe_name(name):
    """`name`, which may be a path or a name on the hub, as a single path component: google/pegasus-xsum ->
    google_pegasus-xsum.

    The result is never empty, hidden, `.` or `..`, and has no separator, so folder / safe_name(name) is directly in the
    folder. A plain name stays as it is.
    """
    parts = [part for part in re.split(r"[/\\]", _BLANKS.sub(" ", name)) if part.strip() not in ("", ".", "..")]
    plain = (
        "_".join(parts).strip().lstrip(".") or Path(name.replace("\0", "")).resolve().name.lstrip(".") or "generator"
    )
    if len(plain.encode()) <= LONGEST_NAME:
        return plain
    digest = hashlib.blake2b(plain.encode(), digest_size=8).hexdigest()
    return plain.encode()[: LONGEST_NAME - 17].decode(errors="ignore") + "_" + digest


def _hash(text):
    return hashlib.blake2b(f"{SPLIT_SEED} {text}".encode(), digest_size=16).digest()


def _places(path, header, columns):
    """The indices of `columns` in the `header` of the file `path`; UserError unless each occurs exactly once."""
    header = [clean(name) for name in header]
    for column in columns:
        if column not in header:
            advice = f"; its columns are: {', '.join(map(repr, header))}"
            parted = next((mark for mark in ";\t|" if mark in "".join(header)), None)
            if parted and len(header) == 1:
                advice += f"; they are separated by {parted!r}; save the file with commas"
            raise UserError(f"{path} has no column {column!r}{advice}")
        if header.count(column) > 1:
            raise UserError(f"{path} has {header.count(column)} columns {column!r}; give each its own name")
    return [header.index(column) for column in columns]


@contextlib.contextmanager
def _open(path):
    """The bytes of a file, decompressed if it is gzip, whatever its name; UserError for other compression."""
    with open(path, "rb") as file:
        start = file.peek(4)
        if start.startswith(PACKED):
            raise UserError(f"{path} is compressed, but not with gzip; decompress it")
        yield gzip.GzipFile(fileobj=file) if start.startswith(GZIP) else file


def _first_line_without_utf8(path):
    """The number of the first line that is not UTF-8; the reader decodes many lines at once, so its error has none."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return None
