"""Says which relative links and anchors of the committed Markdown lead nowhere, and which headings of a page repeat
the text under them, as a merge leaves them. Run by `make check`.

A link leads to a committed file or folder, an anchor to a heading, as GitHub names it, or to an HTML id. What has a
scheme (https:) is not looked at.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from posixpath import normpath
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
LINKS = {"link_open": "href", "image": "src"}
HTML = {"html_block", "html_inline"}
HTML_LINK = re.compile(r"""\b(?:href|src|srcset)\s*=\s*["']([^"']*)["']""")
HTML_ID = re.compile(r"""\b(?:id|name)\s*=\s*["']([^"']*)["']""")
SECTION = re.compile(r"^(?=#+ )", re.MULTILINE)
NOT_IN_ANCHORS = re.compile(r"[^\w\- ]")


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a Markdown file links to, and what of it can be linked to."""

    links: tuple[tuple[int, str], ...]  # line, target as it is written
    anchors: frozenset[str]


def broken_links(pages: Mapping[str, Page], files: frozenset[str]) -> list[str]:
    """ "path:line: what leads nowhere, and why", of pages by their paths. files: all that is committed."""
    known = files | {str(parent) for file in files for parent in PurePosixPath(file).parents}
    found = []
    for path, page in pages.items():
        for line, target in page.links:
            if why := _why_broken(path, target, pages, known):
                found.append(f"{path}:{line}: {target}: {why}")
    return found


def _why_broken(path: str, target: str, pages: Mapping[str, Page], known: frozenset[str]) -> str:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return ""
    linked = unquote(parts.path)
    base = PurePosixPath("." if linked.startswith("/") else PurePosixPath(path).parent)
    to = normpath(str(base / linked.lstrip("/"))) if linked else path
    if to not in known:
        return "no such file is committed"
    if parts.fragment and to in pages and unquote(parts.fragment) not in pages[to].anchors:
        return f"no such heading in {to}"
    return ""


def repeated_sections(path: str, text: str) -> list[str]:
    """ "path: what is there twice": sections of the same heading and the same text."""
    sections = [section.strip() for section in SECTION.split(text)]
    return [
        f"{path}: twice: {section.splitlines()[0]}" for section in sorted(set(sections)) if sections.count(section) > 1
    ]


def read_page(text: str) -> Page:
    """The links and anchors of a Markdown text."""
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    links: list[tuple[int, str]] = []
    anchors: list[str] = []
    line = 1
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        line = block.map[0] + 1 if block.map else line
        for token in (block, *(block.children or ())):
            if token.type in LINKS:
                links.append((line, str(token.attrs[LINKS[token.type]])))
            elif token.type in HTML:
                links += ((line, target) for target in HTML_LINK.findall(token.content))
                anchors += HTML_ID.findall(token.content)
        if block.type == "heading_open" and after is not None:
            anchors.append(_unused(_anchor(after), anchors))
    return Page(links=tuple(links), anchors=frozenset(anchors))


def _anchor(heading: Token) -> str:
    """As GitHub makes it of a heading's text."""
    text = "".join(token.content for token in heading.children or () if token.type in ("text", "code_inline"))
    return NOT_IN_ANCHORS.sub("", text.lower()).replace(" ", "-")


def _unused(anchor: str, used: list[str]) -> str:
    candidates: Iterator[str] = (f"{anchor}-{i}" for i in range(1, len(used) + 1))
    return anchor if anchor not in used else next(each for each in candidates if each not in used)


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = frozenset(file for file in listed.split("\0") if (ROOT / file).is_file())
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in files if file.endswith(".md")}
    wrong = broken_links({file: read_page(text) for file, text in texts.items()}, files)
    wrong += [line for file, text in texts.items() for line in repeated_sections(file, text)]
    for line in sorted(wrong):
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
