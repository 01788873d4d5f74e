"""Readers: from the files of a source to documents ``(category, name, text)``.

One function per format, named in the card. Readers only parse; what is worth keeping is for the
filters to say. Strings of translation catalogues are joined into documents of about
:data:`CATALOGUE_CHARACTERS` characters in catalogue order, because a document of one menu label
teaches nothing about sequences.
"""

from __future__ import annotations

import ast
import gettext
import html
import inspect
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping

Raw = tuple[str, str, str]  # category, name within the source, text
Files = Mapping[str, bytes]
CATALOGUE_CHARACTERS = 1500
_MATH = re.compile(r":math:|\.\. math::|\\frac|\\sum|\\int|\\sqrt|\$[^$]+\$|>>>")
_CLOSING_NOTICE = re.compile(r"\n> [^\n]*\s*(?:---\s*\*\*Source fingerprint[^\n]*\s*)?\Z")
_TAG = re.compile(r"<[^>]+>")
# what stands around the text of a help page: everything up to the article, and from its end on
_FRAME = re.compile(
    r"""(?s)\A.*?id="DisplayArea"[^>]*>|<div (?:id="SearchFrame"|class="navfooter").*\Z"""
    r"""|<div class="navheader">.*?</table>|<(script|style|head|nav)\b.*?</\1>"""
)
_LANGUAGES = ("en", "ko", "es", "de", "ja", "vi")


def _text(raw: bytes) -> str:
    """Bytes that are no UTF-8 become U+FFFD, which the filter ``is_text`` refuses and counts."""
    return raw.decode("utf-8", "replace")


def wiki_extracts(files: Files) -> Iterator[Raw]:
    """Lead sections: JSON of title -> {title, extract}, one file per language."""
    for name in files:
        match = re.search(r"/data/summaries_(en|es)-", name)
        if match:
            for title, entry in sorted(json.loads(files[name]).items()):
                yield match[1], title, f"{entry['title']}\n\n{entry['extract']}"


def factbook(files: Files) -> Iterator[Raw]:
    """One document per country: section and field titles with their text, HTML removed."""
    for name in files:
        if re.search(r"/data/[^/]+/\w\w\.json$", name):
            lines = []
            for section, entries in json.loads(files[name]).items():
                lines.append(f"\n{section}\n")
                _flatten(entries, lines, "")
            yield "en", name.rsplit("/", 1)[1][:2], "\n".join(lines)


def _flatten(node: object, lines: list[str], label: str) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            _flatten(value, lines, label if key == "text" else key)
    elif isinstance(node, str):
        text = " ".join(html.unescape(_TAG.sub(" ", node)).split())
        if text:
            lines.append(f"{label}: {text}")


def korean_manuals(files: Files) -> Iterator[Raw]:
    """Sections of Korean government manuals; broken lines are joined."""
    for name in files:
        if re.search(r"/manual_\w+\.json$", name):
            for section in json.loads(files[name])["sections"]:
                text = "\n".join(page["text"] for page in section["pages"])
                yield "ko", f"{name.rsplit('/', 1)[1]}#{section['id']}", _join_broken_lines(text)


def _join_broken_lines(text: str) -> str:
    """A line of 35 or more characters that ends in Hangul or a comma runs on into the next."""
    text = re.sub(r"(?m)^(.{34,}[\uac00-\ud7a3,]) \n", r"\1 ", text)
    return re.sub(r"(?m)^(.{34,}[\uac00-\ud7a3,])\n", r"\1", text)


def node_docs(files: Files) -> Iterator[Raw]:
    """Markdown manuals, one file per node and language; the closing notice is cut.

    The notice says that a machine wrote the page; a fingerprint of the source may follow it.
    """
    for name in files:
        match = re.search(r"/docs/([^/]+)/(ko|es|de|ja)\.md$", name)
        if match:
            text = _text(files[name])
            yield match[2], f"{match[1]}/{match[2]}", _CLOSING_NOTICE.sub("", text)


def catalogues(files: Files) -> Iterator[Raw]:
    """gettext ``.mo`` files: translated strings of four words or more, joined into documents."""
    for name in files:
        match = re.search(r"/((ko|es|de|ja|vi)(?:_[A-Z]{2})?)/LC_MESSAGES/[\w-]+\.mo$", name)
        if match:
            catalogue = gettext.GNUTranslations(io.BytesIO(files[name]))._catalog
            strings = {
                " ".join(text.split()): None
                for source, text in catalogue.items()
                if source and isinstance(text, str) and text != source and len(text) >= 20
            }
            for i, text in enumerate(_joined(strings)):
                yield match[2], f"{name.rsplit('/', 1)[1]}/{match[1]}/{i}", text


def _joined(strings: Mapping[str, None]) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for string in strings:
        block.append(string)
        size += len(string)
        if size >= CATALOGUE_CHARACTERS:
            yield "\n".join(block)
            block, size = [], 0
    if block:
        yield "\n".join(block)


def docstrings(files: Files) -> Iterator[Raw]:
    """STEM: docstrings that hold formulas or worked examples, one document each.

    A triple-quoted string that opens a line is taken for one: thirty times faster than parsing.
    """
    for name in files:
        if name.endswith(".py") and "/tests/" not in name and "/parser" not in name:
            found = re.finditer(r'(?ms)^( *)[rR]?"""(.+?)"""', _text(files[name]))
            for i, match in enumerate(found):
                text = inspect.cleandoc(match[2])
                if len(text) > 200 and _MATH.search(text):
                    yield "stem", f"{name}#{i}", text


def python_files(files: Files) -> Iterator[Raw]:
    """Code: whole Python files."""
    for name in files:
        if name.endswith(".py"):
            yield "code", name, _text(files[name])


def python_topics(files: Files) -> Iterator[Raw]:
    """The language reference that ``help()`` shows, one document per topic."""
    for node in ast.parse(files["pydoc_data/topics.py"]).body:
        if isinstance(node, ast.Assign):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield "en", topic, text


def html_help(files: Files) -> Iterator[Raw]:
    """HTML pages of a translated manual at ``.../<language>/...``: the text, a line per block."""
    for name in files:
        match = re.search(rf"/({'|'.join(_LANGUAGES)})(?:-US)?/(?:.*/)?[\w.-]+\.html$", name)
        if match:
            body = _FRAME.sub(" ", _text(files[name]))
            body = re.sub(r"(?i)</(p|h\d|li|td|div)>|<br ?/?>", "\n", body)
            lines = (
                " ".join(line.split()) for line in html.unescape(_TAG.sub(" ", body)).splitlines()
            )
            yield match[1], name.split("/", 4)[-1], "\n".join(line for line in lines if line)


READERS: dict[str, Callable[[Files], Iterator[Raw]]] = {
    f.__name__: f
    for f in (
        wiki_extracts,
        factbook,
        korean_manuals,
        node_docs,
        catalogues,
        docstrings,
        python_files,
        python_topics,
        html_help,
    )
}
