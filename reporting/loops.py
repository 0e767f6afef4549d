"""How the training loops of the ResNeXt scripts differ: what a technique is, in code."""

import ast
import difflib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "resnext"


def function(script, name="train"):
    """The lines of the function `name` of a script in resnext/."""
    text = (FOLDER / script).read_text(encoding="utf-8")
    found = next(each for each in ast.parse(text).body if isinstance(each, ast.FunctionDef) and each.name == name)
    return text.splitlines()[found.lineno - 1 : found.end_lineno]


def whole(script):
    """train() of a script, as Markdown."""
    return "\n".join(["```python", *function(script), "```"])


def difference(script, base="resnext.py"):
    """What load_parts(), which makes the model, and train() of `script` have otherwise than those of `base`: a diff in
    Markdown, with a line around a change."""
    parts = ["```diff", f"--- {base}", f"+++ {script}"]
    for name in ("load_parts", "train"):
        lines = list(difflib.unified_diff(function(base, name), function(script, name), lineterm="", n=1))[2:]
        parts += [f" {name}():", *("..." if line.startswith("@@") else line for line in lines)]
    return "\n".join([*parts, "```"])
