"""How the training loops of the ResNeXt scripts differ: what a technique means in code."""

import ast
import difflib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "resnext"


def loop(script):
    """The lines of train() of a script in resnext/."""
    text = (FOLDER / script).read_text(encoding="utf-8")
    train = next(each for each in ast.parse(text).body if isinstance(each, ast.FunctionDef) and each.name == "train")
    return text.splitlines()[train.lineno - 1 : train.end_lineno]


def difference(script, base="resnext.py"):
    """How train() of `script` differs from that of `base`: a diff in Markdown, with one line of context."""
    lines = difflib.unified_diff(loop(base), loop(script), base, script, lineterm="", n=1)
    return "\n".join(["```diff", *("..." if line.startswith("@@") else line for line in lines), "```"])
