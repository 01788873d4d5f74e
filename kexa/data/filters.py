"""Document filters: small named tests, each of which says no for one reason.

A filter takes a text and its category and returns True to keep it. :func:`reject` runs them in
order and names the first that refuses, so that every rejected document is counted once.

chosen: the thresholds; the report filters its corpus but publishes no rules. They are set so that a
source that is what its card says loses under a tenth of its documents while text in the wrong
language, loops and debris are caught.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

MIN_CHARACTERS = {"ko": 80, "ja": 80}  # dense scripts say more per character
DEFAULT_MIN_CHARACTERS = 160
MAX_CHARACTERS = 65_536
_SCRIPT = {
    "ko": re.compile("[\uac00-\ud7a3]"),
    "ja": re.compile("[\u3041-\u30ff]"),  # kana: Chinese has none
    "vi": re.compile("[\u0102\u0103\u0110\u0111\u01a0\u01a1\u01af\u01b0\u1ea0-\u1ef9]", re.I),
}
_SCRIPT_SHARE = {"ko": 0.25, "ja": 0.15, "vi": 0.03}  # of all letters

_FUNCTION_WORDS = {
    "en": "the of and to in is a for that with as on by from are this be or an it not",
    "es": "de la el en y que los las se del una un por con para es al como su no más",
    "de": "der die und das in den von zu ist mit für ein eine des im auf nicht dem werden wird",
}
_FUNCTION_SHARE = 0.12  # of all words; running text has 0.25 to 0.5
_WORD = re.compile(r"\w+")


def normalize(text: str) -> str:
    """NFC, Unix line ends, no trailing blanks. reported: the tokenizer's normalisation is NFC."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[ \t]+\n", "\n", text).strip("\n ")


def has_length(text: str, category: str) -> bool:
    """Long enough to be text, short enough not to be a data table."""
    return MIN_CHARACTERS.get(category, DEFAULT_MIN_CHARACTERS) <= len(text) <= MAX_CHARACTERS


def has_language(text: str, category: str) -> bool:
    """Script share for ko, ja, vi; share of function words for en, es, de; code and stem pass."""
    if category in _SCRIPT:
        letters = sum(map(str.isalpha, text))
        return len(_SCRIPT[category].findall(text)) >= _SCRIPT_SHARE[category] * max(letters, 1)
    if category in _FUNCTION_WORDS:
        words = _WORD.findall(text.lower())
        count = Counter(words)
        known = sum(count[w] for w in _FUNCTION_WORDS[category].split())
        return known >= _FUNCTION_SHARE * max(len(words), 1)
    return True


def has_variety(text: str, category: str) -> bool:
    """Refuse loops: at most 40% of the longer lines may repeat an earlier line."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 20]
    return len(lines) < 5 or len(set(lines)) >= 0.6 * len(lines)


def is_text(text: str, category: str) -> bool:
    """No replacement characters and next to no control characters."""
    control = sum(1 for c in text if ord(c) < 32 and c not in "\n\t")
    return "\ufffd" not in text and control == 0


FILTERS: tuple[Callable[[str, str], bool], ...] = (has_length, is_text, has_language, has_variety)


def reject(text: str, category: str) -> str | None:
    """The name of the first filter that refuses the text, or None."""
    for keep in FILTERS:
        if not keep(text, category):
            return keep.__name__
    return None
