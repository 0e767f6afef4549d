"""Check the links between the Markdown pages: python3 -m reporting.links [FOLDER].

Prints one line on stderr for each broken link, and then exits with code 1.
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
    """["docs/gpu.md: results.md#nowhere", ...]: links in pages below `root` to missing files or headings. Links to
    other sites are not checked."""
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
    """The Markdown pages below `root`; in a Git repository, only those that Git does not ignore."""
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.md"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.split("\0")
    found = [root / name for name in listed if name] or sorted(root.rglob("*.md"))
    return [path for path in found if path.is_file()]


def anchors(page):
    """The anchors that a link to a heading of `page` may have after its #, as GitHub makes them."""
    text = CODE.sub(lambda match: "" if "\n" in match[0] else match[0].strip("`"), page.read_text(encoding="utf-8"))
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def main():
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    found = broken(root)
    for line in found:
        print(f"broken link: {line}", file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
