"""Rewriting the generated parts of README.md, docs/ and the notebook, and nothing else."""

import json
import re

from harness.endings import UserError
from harness.files import atomic_write
from reporting.records import warn

MARKER = re.compile(r"<!-- (?P<end>/?)report:(?P<name>[^ >]*) -->")
NOTEBOOK = "SimCLS/SimCLS.ipynb"
NO_RECORD = "No record of a clean commit yet."


def pages(folder):
    """The Markdown pages below `folder` that have generated parts: README.md, those in docs/, and the notebook.

    UserError where there is no README.md.
    """
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md; name the folder of the repository, or leave it out")
    found = [folder / "README.md", *sorted((folder / "docs").rglob("*.md")), folder / NOTEBOOK]
    return [path for path in found if path.is_file() and b"<!-- report:" in path.read_bytes()]


def rewrite(path, bodies, root=None):
    """Put bodies[NAME] between `<!-- report:NAME -->` and `<!-- /report:NAME -->` in the file `path`, for each pair.

    A link to /PLACE in a body is one to PLACE in `root`. A body of "" says that there is no record. UserError, with the
    file untouched, when a name is unknown or a marker has no partner. The same bodies twice leave the file as the first
    time did.
    """
    try:
        text = path.read_bytes().decode("utf-8")  # Not as text, which would change its line ends.
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no UTF-8 text'}") from None
    depth = len(path.relative_to(root).parts) - 1 if root else 0
    if path.suffix == ".ipynb":
        new = _rewritten_notebook(path, text, bodies, depth)
    else:
        new = _rewritten(path, text, bodies, depth)
    if new != text:
        with atomic_write(path) as file:
            file.write(new.encode("utf-8"))


def _rewritten_notebook(path, text, bodies, depth):
    """A notebook's JSON with new parts in its Markdown cells, laid out as Jupyter writes it."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and MARKER.search(source):
            cell["source"] = _rewritten(path, source, bodies, depth).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _rewritten(path, text, bodies, depth):
    """`text`, which is of the page `path`, with the bodies between its markers. depth: of the page below the root."""
    new, position = [], 0
    for start, end in _pairs(path, text, bodies):
        body = bodies[start["name"]]
        if not body:
            warn(f"{path.name} has no records for {start['name']}")
        body = body.replace("](/", f"]({'../' * depth}") or NO_RECORD
        new += [text[position : start.end()], f"\n{body}\n"]
        position = end.start()
    return "".join([*new, text[position:]])


def _pairs(path, text, bodies):
    """[(start, end), ...]: the matches of each pair of markers."""
    markers = list(MARKER.finditer(text))
    if not markers:
        raise UserError(f"{path} has no marker such as <!-- report:data-loader -->; put one where a table should stand")
    for marker in markers:
        if marker["name"] not in bodies:
            raise UserError(f"{_place(path, text, marker)} names no table; there are {', '.join(bodies)}")
    for index, marker in enumerate(markers):
        is_end = index % 2 == 1
        partner = markers[index - 1] if is_end else None
        if bool(marker["end"]) != is_end or (partner and partner["name"] != marker["name"]):
            raise UserError(f"{_place(path, text, marker)} has no partner; each table needs both of its markers")
    if len(markers) % 2:
        raise UserError(f"{_place(path, text, markers[-1])} has no partner; each table needs both of its markers")
    return list(zip(markers[::2], markers[1::2], strict=True))


def _place(path, text, marker):
    line = text.count("\n", 0, marker.start()) + 1
    return f"{path}, line {line}: the marker {marker[0]}"
