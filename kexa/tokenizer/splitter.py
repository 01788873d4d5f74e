"""Cut text into pre-tokens as the library does, several times faster.

The split patterns speak of letters, marks, numbers and spaces. Python's ``re`` has no such classes,
and its idea of a space differs, so the classes are asked of the library once, written out as
ranges, and put into the pattern. Equal classes and equal alternatives give equal pieces.

chosen: only text of the basic plane (U+0000 to U+FFFF) goes the fast way: ``re`` looks such a
character up in a bitmap, and walks a list of ranges for the others. Text with a character beyond,
an emoji for instance, is cut by the library.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable

from tokenizers import Regex, normalizers, pre_tokenizers

_NFC, _NFD = normalizers.NFC(), normalizers.NFD()
_PLANE = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
_BEYOND = re.compile("[\U00010000-\U0010ffff]")
_CLASSES = (r"\p{L}", r"\p{M}", r"\p{N}", r"\s")


class Splitter:
    """The pieces that a pattern cuts a text into, in order; together they are the text.

    ``pattern`` has no capturing group and its alternatives leave out no character, as in
    :mod:`kexa.tokenizer.vocabulary`. The strings in ``whole`` are one piece wherever they stand,
    and what stands around them is cut as if the text ended there.
    """

    def __init__(self, pattern: str, whole: Collection[str] = ()):
        self._library = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        self._fast = re.compile(_written_out(pattern))
        self._whole = re.compile(f"({'|'.join(map(re.escape, whole)) or '(?!)'})")

    def __call__(self, text: str) -> list[str]:
        if not self._whole.search(text):
            return self._cut(text)
        pieces = []
        for i, part in enumerate(self._whole.split(text)):
            pieces += [part] if i % 2 else self._cut(part)
        return pieces

    def _cut(self, text: str) -> list[str]:
        if _BEYOND.search(text):
            return [piece for piece, _ in self._library.pre_tokenize_str(text)]
        return self._fast.findall(text)


def require_text(document: object, name: str) -> None:
    """Refuse what has no UTF-8 form; ``name`` says in the message which document it is.

    Raises:
        ValueError: the document is no ``str``, or holds a lone surrogate.
    """
    if not isinstance(document, str):
        raise ValueError(f"{name} is {type(document).__name__}, not str; decode it as UTF-8 first")
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds the lone surrogate U+{ord(document[error.start]):04X} at character "
            f"{error.start}, which has no UTF-8 form; remove it"
        ) from None


def nfc(text: str) -> str:
    """NFC by the library's tables, which are those that an exported tokenizer applies.

    The library is asked only where NFC might change something: text is in NFC when each of its
    characters alone is, and none is a mark or joins one before it.
    """
    if text.isascii() or not _unstable().search(text):
        return text
    return _NFC.normalize_str(text)


def count_pre_tokens(
    texts: Iterable[str], pattern: str, whole: Collection[str] = ()
) -> Counter[str]:
    """How often each distinct pre-token occurs in texts that are normalised already.

    The texts are read once and not kept: memory follows the number of distinct pre-tokens.

    Args:
        whole: strings that are one pre-token wherever they stand, as special tokens are.
    """
    split, counts = Splitter(pattern, whole), Counter()
    for text in texts:
        counts.update(split(text))
    return counts


def _written_out(pattern: str) -> str:
    """The pattern with the library's classes as ranges of the basic plane."""
    pattern = pattern.replace(r"\S", r"[^\s]")
    for name in _CLASSES:
        ranges = _ranges(name)
        pattern = re.sub(r"\[[^]]*\]", lambda m, n=name, r=ranges: m[0].replace(n, r), pattern)
        pattern = pattern.replace(name, f"[{ranges}]")
    return pattern


@functools.cache
def _unstable() -> re.Pattern[str]:
    """Finds what NFC may change: all beyond the basic plane, to be short and quick."""
    apart = "\U0010ffff"  # joins nothing
    forms = [form.normalize_str(apart.join(_PLANE)).split(apart) for form in (_NFC, _NFD)]
    found = set()
    for character, composed, decomposed in zip(_PLANE, *forms, strict=True):
        rest = decomposed[1:]
        found.update(rest if composed == character else rest + character)
    marks, others = _ranges(r"\p{M}"), re.escape("".join(sorted(found)))
    return re.compile(f"[{marks}{others}\U00010000-\U0010ffff]")


@functools.cache
def _ranges(name: str) -> str:
    """A class of the library's regular expressions as the inside of a bracket of ``re``."""
    matches = pre_tokenizers.Split(Regex(f"{name}+"), behavior="removed", invert=True)
    runs = [run for run, _ in matches.pre_tokenize_str(_PLANE)]
    return "".join(f"\\u{ord(run[0]):04x}-\\u{ord(run[-1]):04x}" for run in runs)
