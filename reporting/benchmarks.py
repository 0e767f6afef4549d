"""The records of benchmarks/, each a claim with both of its sides measured in one run."""

import ast
import json
from pathlib import Path

from reporting.comparison import number
from reporting.records import warn
from reporting.tables import markdown

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
WITH_TABLES = ("fast", "layout", "memory")


def render(folder):
    """Markdown: for each hardware a table of ratios, old way over new, and what each benchmark claims."""
    parts = []
    for hardware, benchmarks in by_hardware(folder).items():
        rows = [row for record in benchmarks for row in _ratio_rows(record)]
        if rows:
            names = dict.fromkeys(row["Benchmark"].strip("`") for row in rows)
            claims = [f"- `{name}`: {claim}" for name in names if (claim := _claim(name))]
            heading = f"{hardware}, both sides of a row in one run, interleaved:"
            parts += [heading, markdown(rows), *["\n".join(claims)] * bool(claims)]
    return "\n\n".join(parts)


def render_tables(folder, benchmark):
    """Markdown: the tables that the records of `benchmark`, one of WITH_TABLES, bring along."""
    parts = []
    for hardware, benchmarks in by_hardware(folder).items():
        for record in benchmarks:
            if record["benchmark"] == benchmark:
                for _, table in _tables(record):
                    parts += [f"{', '.join(filter(None, [record.get('model'), hardware]))}:", table]
    return "\n\n".join(parts)


def by_hardware(folder):
    """{hardware: [record, ...]} of the whole records `folder`/*/*.json; others are named on stderr."""
    found = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            record = json.loads(path.read_bytes())
            found.setdefault(record["machine"]["hardware"], []).append(record | {"benchmark": record["benchmark"]})
        except (OSError, ValueError) as error:
            warn(f"skipped {path}: not whole JSON ({type(error).__name__}); run its benchmark again, or delete it")
        except (KeyError, TypeError):
            warn(f"skipped {path}: no record of a benchmark")
    return found


def _ratio_rows(record):
    for case, found in _ratios("", record):
        yield {
            "Benchmark": f"`{record['benchmark']}`",
            "Case": ", ".join(filter(None, [record.get("model"), case])) or None,
            "Ratio": number(found["median"]),
            "95 % interval": " to ".join(map(number, found["interval"])) if "interval" in found else None,
            "Lowest to highest": f"{number(found['low'])} to {number(found['high'])}",
        }


def _ratios(name, value):
    """Yield (where, ratio) for every {"median", "low", "high"} in a record, as benchmarks.common makes them."""
    if not isinstance(value, dict):
        return
    if {"median", "low", "high"} <= value.keys():
        yield name, value
        return
    for key, part in value.items():
        # "results" and "ratio" say nothing that the heading does not.
        words = [name, "" if key in ("results", "ratio", "ratios") else key.replace("_", " ")]
        yield from _ratios(", ".join(filter(None, words)), part)


def _tables(record):
    """Yield (name, Markdown) for every list of flat dicts in a record: rows to be shown as they are."""
    for name, value in record.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            headers = dict.fromkeys(key for row in value for key in row)
            plain = [key for key in headers if all(_is_plain(row.get(key)) for row in value)]
            yield name, markdown([dict(_cell(key, row.get(key)) for key in plain) for row in value])


def _is_plain(value):
    return value is None or isinstance(value, (str, int, float))


def _cell(key, value):
    """(header, text or None) of a figure; bytes are given in MiB."""
    header = key.replace("_", " ")
    if key.endswith("bytes"):
        header, value = header.removesuffix("bytes") + "MiB", value and value / 2**20
    header = header.replace("mib", "MiB")
    if value is None:
        return header, None
    if isinstance(value, bool):
        return header, "yes" if value else "no"
    return header, number(value) if isinstance(value, float) else str(value)


def _claim(benchmark):
    """What the script says that it shows, in the paragraph of its docstring that begins with "Claim:"; else None."""
    try:
        docstring = ast.get_docstring(ast.parse((SCRIPTS / f"{benchmark}.py").read_text(encoding="utf-8")))
    except (OSError, SyntaxError):
        return None
    paragraphs = [paragraph.replace("\n", " ") for paragraph in (docstring or "").split("\n\n")]
    return next((text.removeprefix("Claim:").strip() for text in paragraphs if text.startswith("Claim:")), None)
