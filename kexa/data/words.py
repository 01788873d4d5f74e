"""Words for comparing texts: what is left when spacing, case and punctuation do not count.

    words = runs of letters and digits of the NFKC text in lower case;
            each kana and Han character is a word of its own, since nothing separates them

Used by repetition, near-duplicates and decontamination, so that all three mean the same by "the
same words". chosen: all of it.
"""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = "\u3041-\u30ff\u3400-\u9fff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in order."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
