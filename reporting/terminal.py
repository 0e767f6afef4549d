"""Markdown, made for reading on a terminal: its tables in columns that are as wide as what they hold."""

import re

TABLE = re.compile(r"(?:^\|.*\|\n?)+", flags=re.MULTILINE)


def aligned(text):
    """`text` with every Markdown table in columns: numbers to the right, words to the left, no bars."""
    return TABLE.sub(lambda match: _columns(match[0]), text)


def _columns(table):
    lines = [
        [cell.replace("\\|", "|").replace("&lt;", "<").replace("`", "") for cell in line.strip()[2:-2].split(" | ")]
        for line in table.strip().splitlines()
    ]
    header, rules, *rows = lines
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [rule.strip().endswith(":") for rule in rules]

    def line(cells):
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)]) + "\n"
