"""One text with where it is from: what every step of the corpus hands on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text. ``language`` is "en" for code and stem; ``id`` is ``source/name``."""

    text: str
    source: str
    language: str
    category: str
    id: str

    @property
    def hash(self) -> str:
        """sha256 of the text: its identity for order, duplicates and the split."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def bytes(self) -> int:
        """UTF-8 length; lone surrogates, which UTF-8 does not have, count three."""
        return len(self.text.encode("utf-8", "surrogatepass"))
