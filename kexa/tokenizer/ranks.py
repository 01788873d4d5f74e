"""The vocabulary as a tiktoken ranks file, and what encoding with one means.

``ranks.tiktoken`` has one line per token, "base64 of its bytes, space, rank", special tokens left
out; a token's rank is its id. Encoding a pre-token starts from its bytes and joins, again and
again, the two neighbours whose bytes together have the lowest rank, the leftmost first.

The two formats differ in what a merge is. ``tokenizer.json`` lists pairs of tokens; a ranks file
has spellings only, so any two neighbours that spell a token merge, at that token's rank. Merges are
listed here in the order of the ids they make, one for each token, so the ids are equal wherever
neighbours that spell a token are its listed pair. They can differ where the same bytes come about
as another pair: tokens ``ab``, ``c`` and the merge ``ab + c``, but ``a`` beside ``bc`` in the text.
The library leaves those apart, a ranks file joins them. :func:`single_spelling` says whether the
merges themselves hold such a case; text may still hold one.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Tokenizer

from kexa.record import write_atomic
from kexa.tokenizer import bpe
from kexa.tokenizer.vocabulary import SPECIAL_TOKENS

RANKS = "ranks.tiktoken"


def save_ranks(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write ``ranks.tiktoken``."""
    lines = [
        f"{base64.b64encode(token_bytes(token)).decode('ascii')} {rank}\n"
        for rank, token in enumerate(bpe.parts(tokenizer)[0])
        if token not in SPECIAL_TOKENS
    ]
    write_atomic(Path(directory) / RANKS, "".join(lines))


def load_ranks(path: str | Path) -> dict[bytes, int]:
    """Rank by token bytes, from a file; see :func:`parse_ranks`."""
    return parse_ranks(Path(path).name, Path(path).read_bytes())


def parse_ranks(name: str, content: bytes) -> dict[bytes, int]:
    """Rank by token bytes, from the content of a ranks file called ``name``.

    Raises:
        ValueError: a line is not base64, a space and a number; the message has its number.
    """
    ranks = {}
    for number, line in enumerate(content.decode("ascii").splitlines(), start=1):
        try:
            token, rank = line.split(" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"line {number} of {name} is {line!r}, not 'base64 rank'; write the file again"
            ) from error
    return ranks


def encode_with_ranks(ranks: Mapping[bytes, int], pre_tokens: Iterable[str]) -> list[int]:
    """Ids of pre-tokens by the rule above: plain, quadratic, to compare with."""
    ids = []
    for pre_token in pre_tokens:
        data = pre_token.encode("utf-8")
        parts = [data[i : i + 1] for i in range(len(data))]
        while spelled := [
            (ranks[left + right], i)
            for i, (left, right) in enumerate(itertools.pairwise(parts))
            if left + right in ranks
        ]:
            i = min(spelled)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def single_spelling(tokenizer: Tokenizer) -> bool:
    """Whether every merged token is made by one merge and the merges come in the order of ids."""
    vocab, merges = bpe.parts(tokenizer)
    return [left + right for left, right in merges] == vocab[len(vocab) - len(merges) :]


def token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token string stands for."""
    return bytes(_BYTE[character] for character in token)


_BYTE = bpe.byte_of_character()
