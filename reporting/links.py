"""Check the links between the Markdown pages: python3 -m reporting.links [FOLDER].

One line on stderr for each that leads nowhere, and then exit code 1.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", flags=re.MULTILINE)


def broken(root):
    """["docs/gpu.md: results.md#nowhere", ...]: the links in pages below `root` to files or headings that are not
    there. Links to other sites are not looked at."""
    found = []
    for page in pages(root):
        for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" in link or link.startswith("mailto:"):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                found.append(f"{page.relative_to(root)}: {link}")
    return found


def pages(root):
    """The Markdown pages below `root`, those alone that Git keeps where it keeps any."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.md"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.split("\0")
    found = [root / name for name in listed if name] or sorted(root.rglob("*.md"))
    return [path for path in found if path.is_file()]


def anchors(page):
    """What a link to a heading of `page` may say after its #, as GitHub makes it."""
    text = CODE.sub(lambda match: "" if "\n" in match[0] else match[0].strip("`"), page.read_text(encoding="utf-8"))
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def main():
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    found = broken(root)
    for line in found:
        print(f"leads nowhere: {line}", file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
