"""Markdown for reading on a terminal: its tables in columns as wide as their contents."""

import re
import shutil
import textwrap

TABLE = re.compile(r"(?:^\|.*\|\n?)+", flags=re.MULTILINE)
GAP = "  "


def aligned(text, width=None):
    """`text` with every Markdown table in columns: numbers right-aligned, words left-aligned, no bars.

    In a table wider than `width`, by default the terminal's, headers are wrapped; if that is not enough, values that
    all rows share are printed once, above the table.
    """
    width = width or shutil.get_terminal_size().columns
    return TABLE.sub(lambda match: _table(match[0], width), text)


def _table(table, width):
    header, rules, *rows = [
        [cell.replace("\\|", "|").replace("&lt;", "<").replace("`", "") for cell in line.strip()[2:-2].split(" | ")]
        for line in table.strip().splitlines()
    ]
    columns = [
        ([head], cells, rule.strip().endswith(":")) for head, rule, *cells in zip(header, rules, *rows, strict=True)
    ]
    shared = ""
    if _width(columns) > width:
        columns = [(textwrap.wrap(head[0], _narrowest(head[0], cells)), cells, right) for head, cells, right in columns]
    if _width(columns) > width and len(set(map(tuple, rows))) > 1:
        alike = [column for column in columns if len(set(column[1])) == 1]
        columns = [column for column in columns if column not in alike]
        shared = "".join(f"{' '.join(head)}: {cells[0]}\n" for head, cells, _ in alike)
    height = max(len(head) for head, *_ in columns)
    lines = [
        [*[""] * (height - len(head)), *head, "-" * _column_width(head, cells), *cells] for head, cells, _ in columns
    ]
    padded = [
        [line.rjust(max(map(len, each))) if right else line.ljust(max(map(len, each))) for line in each]
        for each, (*_, right) in zip(lines, columns, strict=True)
    ]
    return shared + "".join(f"{GAP.join(line).rstrip()}\n" for line in zip(*padded, strict=True))


def _narrowest(head, cells):
    return max(map(len, [*head.split(), *cells]))


def _column_width(head, cells):
    return max(map(len, [*head, *cells]))


def _width(columns):
    return sum(_column_width(head, cells) for head, cells, _ in columns) + len(GAP) * (len(columns) - 1)
