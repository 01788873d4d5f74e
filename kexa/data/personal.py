"""Personal information in text is replaced by the special token of its kind.

reported: the vocabulary has the tokens ``PI:EMAIL`` and ``PI:PHONE_NUM``. inferred: that they stand
where an e-mail address or a telephone number stood in the training text. chosen: the patterns. They
prefer to miss a number over masking one that is none: a telephone number needs a country code, a
Korean or Japanese leading zero with hyphens, or North American brackets. In code and stem only
addresses are replaced, because digits with hyphens are data there.
"""

from __future__ import annotations

import re

EMAIL, PHONE = "PI:EMAIL", "PI:PHONE_NUM"
_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w@-])",
    re.ASCII,
)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+[1-9]\d{0,2}[ -](?:\(\d{1,4}\)[ -]?)?\d{1,4}(?:[ -]\d{2,4}){1,4}"  # +82 10-1234-5678
    r"|\+[1-9]\d{9,13}"  # +821012345678
    r"|0\d{1,3}-\d{3,4}-\d{4}"  # 02-123-4567, 010-1234-5678
    r"|\(\d{3}\) ?\d{3}-\d{4}"  # (555) 123-4567
    r")(?![\w-]|\.\d)",
    re.ASCII,
)


def mask_personal(text: str, category: str) -> str:
    """The text with e-mail addresses and telephone numbers replaced by their special tokens."""
    text = _EMAIL.sub(EMAIL, text) if "@" in text else text
    return text if category in ("code", "stem") else _PHONE.sub(PHONE, text)
