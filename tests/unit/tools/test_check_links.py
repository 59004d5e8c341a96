"""Links between pages are resolved as GitHub resolves them."""

from tools.check_links import broken_links, read_page, repeated_sections

FILES = frozenset({"README.md", "docs/a.md", "docs/figure.svg", "src/code.py"})


def broken(text: str, *, path: str = "README.md", other: str = "") -> list[str]:
    return broken_links({path: read_page(text), "docs/a.md": read_page(other)}, FILES)


def test_links_that_resolve() -> None:
    text = """# The page

[file](docs/a.md), [folder](docs), [line](src/code.py#L3), ![figure](docs/figure.svg), [out](https://example.org/x.md),
[here](#the-page), [there](docs/a.md#what-0-means-serveport), <a href="docs/a.md#by-hand">x</a>, [ref].

```
[no link](nowhere.md)
```

| a |
|---|
| [cell](docs/a.md#twice-1) |

[ref]: docs/a.md
"""
    other = '## What *0* means: `serve.port`\n\n## Twice\n\n## Twice\n\n<a id="by-hand"></a>\n'
    assert broken(text, other=other) == []


def test_links_that_lead_nowhere_are_named_with_their_lines() -> None:
    text = """[a](docs/b.md)

[b](#none)

[c](docs/a.md#none)

| x |
|---|
| ![d](figure.svg) |

[e][ref]

[ref]: x.md
"""
    assert broken(text, other="# Some\n") == [
        "README.md:1: docs/b.md: no such file is committed",
        "README.md:3: #none: no such heading in README.md",
        "README.md:5: docs/a.md#none: no such heading in docs/a.md",
        "README.md:9: figure.svg: no such file is committed",
        "README.md:11: x.md: no such file is committed",
    ]


def test_links_are_relative_to_their_page_or_to_the_root() -> None:
    links = "[a](../README.md) [b](figure.svg) [c](/docs/figure.svg) [d](docs/figure.svg) [e](../../x.md)"
    found = broken_links({"docs/a.md": read_page(links)}, FILES)
    assert [line.split(": ")[1] for line in found] == ["docs/figure.svg", "../../x.md"]


def test_a_section_that_stands_twice_is_named() -> None:
    page = "# Page\n\n## One\n\ntext\n\n## Two\n\nother\n\n## One\n\ntext\n"
    assert repeated_sections("README.md", page) == ["README.md: twice: ## One"]
    assert repeated_sections("README.md", page.replace("text", "more", 1)) == []
