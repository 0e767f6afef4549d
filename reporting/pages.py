"""Rewrites the generated parts of README.md, docs/ and the notebook, and nothing else."""

import json
import re

from harness.endings import UserError
from harness.files import atomic_write
from reporting.records import warn

MARKER = re.compile(r"<!-- /?report:[^ >]* -->")
PAIR = re.compile(r"(<!-- report:([^ >]*) -->)(.*?)(<!-- /report:\2 -->)", flags=re.DOTALL)
NOTEBOOK = "SimCLS/SimCLS.ipynb"
NO_RECORD = "No record of a clean commit yet."


def pages(folder):
    """The Markdown pages below `folder` that have generated parts: README.md, those in docs/, and the notebook.

    UserError if there is no README.md.
    """
    if not (folder / "README.md").is_file():
        raise UserError(f"{folder} has no README.md; choose the folder of the repository, or leave it out")
    found = [folder / "README.md", *sorted((folder / "docs").rglob("*.md")), folder / NOTEBOOK]
    return [path for path in found if path.is_file() and b"<!-- report:" in path.read_bytes()]


def rewrite(paths, bodies, root=None):
    """Put bodies[NAME] between `<!-- report:NAME -->` and `<!-- /report:NAME -->` in the files `paths`, for each pair.

    A link to /PLACE in a body becomes one to PLACE in `root`. A body of "" is replaced by a note that there is no
    record. UserError, with all files untouched, if one cannot be read, or if in one a name is unknown or a marker has
    no partner. Idempotent.
    """
    changed = {}
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")  # Not as text, which would change its line endings.
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"cannot read {path}: {reason}") from None
        depth = len(path.relative_to(root).parts) - 1 if root else 0
        fill = _rewritten_notebook if path.suffix == ".ipynb" else _rewritten
        new = fill(path, text, bodies, depth)
        if new != text:
            changed[path] = new
    for path, new in changed.items():
        with atomic_write(path) as file:
            file.write(new.encode("utf-8"))


def _rewritten_notebook(path, text, bodies, depth):
    """A notebook's JSON with new parts in its Markdown cells, formatted like Jupyter's."""
    try:
        notebook = json.loads(text)
        sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not a notebook; restore it, for example with git checkout") from None
    for cell, source in zip(notebook["cells"], sources, strict=True):
        if cell["cell_type"] == "markdown" and MARKER.search(source):
            cell["source"] = _rewritten(path, source, bodies, depth).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _rewritten(path, text, bodies, depth):
    """`text`, from the page `path`, with the bodies between its markers. depth: of the page below the root."""
    pairs = PAIR.findall(text)
    alone = MARKER.findall("".join([PAIR.sub("", text), *(inside for _, _, inside, _ in pairs)]))
    if alone:
        raise UserError(f"{path}: the marker {alone[0]} has no partner; each table needs both of its markers")
    if not pairs:
        raise UserError(f"{path} has no marker such as <!-- report:data-loader -->; put one where a table should be")

    def filled(pair):
        start, name, _, end = pair.groups()
        if name not in bodies:
            raise UserError(f"{path}: the marker {start} names no table; choose from {', '.join(bodies)}")
        if not bodies[name]:
            warn(f"{path.name} has no records for {name}")
        body = bodies[name].replace("](/", f"]({'../' * depth}") or NO_RECORD
        return f"{start}\n{body}\n{end}"

    return PAIR.sub(filled, text)
