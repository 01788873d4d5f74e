"""Byte-pair encoding for the stock ``tokenizers`` library, with the one thing it lacks: resuming.

The library trains BPE only from single characters and from text in which every word stands as often
as it occurs. To continue from an existing vocabulary we

1. encode the text with the tokenizer so far, each distinct pre-token once, with its count,
2. learn merges on the rows of ids (:mod:`kexa.tokenizer.learn`), cut where no merge may happen, and
3. translate them back to byte-level strings and append them.

BPE applies merges in rank order, so appended merges act on exactly the segmentation they were
learned from. Training from the bytes up is resuming from them; what is learned is what the library
learns from the text itself (a test compares them).

What may be left out of a text, and why nothing that is learned changes. A merge needs its two
tokens to meet, so it is never more frequent than they are: where two tokens meet less than
``floor`` times no merge of count ``floor`` or more can cross. A text may be cut there, and learning
stops at that count. When as many merges are found as asked, all of them are at least that frequent
and would have been found without cuts; when not, ``floor`` is lowered, to ``MIN_COUNT`` in the end.
Memory follows the number of distinct frequent phrases, not the length of the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from kexa.tokenizer.learn import Row, learn
from kexa.tokenizer.splitter import count_pre_tokens
from kexa.tokenizer.vocabulary import NUM_BYTES, PLACEHOLDERS, SPECIAL_TOKENS

MIN_COUNT = 2  # chosen: a pair seen once is not evidence of a token
Merge = tuple[str, str]

_DECODER = decoders.ByteLevel()
_NORMALIZERS = {"NFC": normalizers.NFC, "NFKC": normalizers.NFKC}
_HEADROOM = 4  # the first floor is this fraction of a guess, so that it rarely has to be lowered
_EVEN = 64  # and of the count that each merge would have if all meetings were shared evenly


class Text(Protocol):
    """A text to learn from."""

    def meetings(self) -> np.ndarray:
        """How often tokens meet where a merge may join them, by pair, in any order; int64."""

    def at(self, floor: int) -> Encoded:
        """The text, perhaps without meetings of two tokens that meet less than ``floor`` times."""


@dataclass(frozen=True)
class Encoded:
    """Distinct pre-tokens end to end as token ids; ``joined[i]``: a merge may join i and i + 1."""

    ids: np.ndarray  # int32 [N]
    joined: np.ndarray  # bool [N], False at the end of each pre-token
    counts: np.ndarray  # int64 [N], how often the pre-token that holds the token occurs

    def usage(self, num_ids: int) -> np.ndarray:
        """How often the text uses each token; int64 [num_ids]."""
        used = np.zeros(num_ids, dtype=np.int64)
        np.add.at(used, self.ids, self.counts)
        return used

    def meetings(self) -> np.ndarray:
        """How often tokens meet where a merge may join them, by pair; int64."""
        where = np.flatnonzero(self.joined).astype(np.int32)
        pairs = self.ids[where].astype(np.int64) << 32 | self.ids[where + 1]
        order = np.argsort(pairs).astype(np.int32)
        pairs = pairs[order]
        starts = np.flatnonzero(np.diff(pairs, prepend=-1))
        weights = self.counts[where[order]]
        return np.add.reduceat(weights, starts) if len(starts) else weights

    def at(self, floor: int) -> Encoded:
        """All of the text: it leaves out nothing."""
        return self


def build(vocab: list[str], merges: list[Merge], pattern: str, normalizer: str) -> Tokenizer:
    """A stock tokenizer from tokens in id order (special tokens first) and merges in rank order.

    Special tokens are matched after normalisation, so that ``decode(encode(x))`` is the normalised
    x even where a combining mark follows a special token's last character.
    """
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges))
    tokenizer.normalizer = _NORMALIZERS[normalizer]()
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(t, special=t not in PLACEHOLDERS, normalized=True) for t in SPECIAL_TOKENS]
    )
    return tokenizer


def pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cut by a regular expression, then write bytes as printable characters."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def train(texts: Iterable[str], vocab_size: int, pattern: str, normalizer: str) -> Tokenizer:
    """Plain byte-level BPE from the 256 bytes up.

    Raises:
        ValueError: the text has too few recurring pairs for ``vocab_size``.
    """
    normalise = _NORMALIZERS[normalizer]().normalize_str
    normal = (text if text.isascii() else normalise(text) for text in texts)
    text = _as_bytes(count_pre_tokens(normal, pattern, whole=SPECIAL_TOKENS))
    vocab, merges = [*SPECIAL_TOKENS, *byte_alphabet()], []
    resume(vocab, merges, text, vocab_size - len(vocab))
    require("baseline merges", len(vocab), vocab_size)
    return build(vocab, merges, pattern, normalizer)


def parts(tokenizer: Tokenizer) -> tuple[list[str], list[Merge]]:
    """Tokens in id order and merges in rank order."""
    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    return vocab, [(left, right) for left, right in model["merges"]]


def byte_alphabet() -> list[str]:
    """The characters that stand for the 256 bytes, sorted."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == NUM_BYTES
    return alphabet


def byte_of_character() -> dict[str, int]:
    """Of that alphabet: printable bytes stand for themselves; the others are U+0100 and up."""
    printable = [ord(c) for c in byte_alphabet() if ord(c) < NUM_BYTES]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    shifted = {chr(NUM_BYTES + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


def is_text(token: str) -> bool:
    """Whether a byte-level token string is whole characters, not the bytes of part of one."""
    return "\ufffd" not in _DECODER.decode([token])


def formed_counts(usage: np.ndarray, vocab: list[str], merges: list[Merge]) -> np.ndarray:
    """How often each token is formed while encoding a text that uses token i ``usage[i]`` times.

    ``formed(t) = usage(t) + sum of formed(u)`` over the merges ``u = left + right`` with a part t,
    so the parts of a token are never rarer than the token: the most frequent k tokens include every
    token that their merges pass through.
    """
    ids = {token: i for i, token in enumerate(vocab)}
    formed, seen = usage.astype(np.int64).copy(), set()
    first = [m for m in merges if m[0] + m[1] not in seen and not seen.add(m[0] + m[1])]
    for left, right in reversed(first):
        count = formed[ids[left + right]]
        formed[ids[left]] += count
        formed[ids[right]] += count
    return formed


def keep_most_frequent(
    usage: np.ndarray, vocab: list[str], merges: list[Merge], count: int
) -> tuple[list[str], list[Merge]]:
    """Special tokens, bytes and the ``count`` merged tokens formed most often; their merges."""
    fixed = len(SPECIAL_TOKENS) + NUM_BYTES
    formed = formed_counts(usage, vocab, merges)[fixed:]
    chosen = np.sort(np.argsort(-formed, kind="stable")[:count]) + fixed
    kept = vocab[:fixed] + [vocab[i] for i in chosen]
    known = set(kept)
    return kept, [(a, b) for a, b in merges if a in known and b in known and a + b in known]


def resume(
    vocab: list[str],
    merges: list[Merge],
    text: Text,
    count: int,
    accept: Callable[[str], bool] = lambda token: True,
) -> int:
    """Learn up to ``count`` more tokens from ``text``; append them and their merges to both lists.

    Args:
        accept: a token it refuses is left out. It must refuse whatever contains a refused token.

    Returns:
        The number learned: less than ``count`` when no further accepted pair recurs in the text.
    """
    asked, more, learned = count + count // 4, True, []  # room for refused and known tokens
    while more and len(learned) < count:
        on_ids, more = _train_on_ids(text, asked)
        found = [("".join(vocab[i] for i in a), "".join(vocab[i] for i in b)) for a, b in on_ids]
        known = set(vocab)
        tokens = dict.fromkeys(left + right for left, right in found)
        learned = [t for t in tokens if t not in known and accept(t)][:count]
        asked *= 2
    waiting, have = set(learned), set(merges)
    for pair in found:
        if not waiting:
            break
        token = "".join(pair)
        if pair not in have and (token in known or token in waiting):
            merges.append(pair)
            if token in waiting:
                waiting.remove(token)
                known.add(token)
                vocab.append(token)
    return len(learned)


def require(what: str, found: int, wanted: int) -> None:
    """Raise when a text could not supply the tokens asked of it."""
    if found < wanted:
        raise ValueError(
            f"{what}: the text supplies {found} of {wanted} (a pair must occur {MIN_COUNT} times); "
            f"give more text or lower tokenizer.vocab_size"
        )


def _as_bytes(counts: Mapping[str, int]) -> Encoded:
    """Pre-tokens before any merge."""
    ids = np.zeros(NUM_BYTES, dtype=np.int32)
    for i, character in enumerate(byte_alphabet(), start=len(SPECIAL_TOKENS)):
        ids[byte_of_character()[character]] = i
    lengths = np.fromiter((len(s.encode("utf-8")) for s in counts), np.int64, len(counts))
    row = ids[np.frombuffer("".join(counts).encode("utf-8"), np.uint8)]
    joined = np.ones(len(row), dtype=bool)
    joined[np.cumsum(lengths) - 1] = False
    weights = np.fromiter(counts.values(), np.int64, len(counts))
    return Encoded(row, joined, np.repeat(weights, lengths))


def _train_on_ids(text: Text, asked: int) -> tuple[list[tuple[Row, Row]], bool]:
    """Merges of plain BPE, each two rows of ids, and whether they are all asked.

    The merges make at most ``asked`` tokens; two of them may make the same one.
    """
    floor = _first_floor(text.meetings(), asked)
    while True:
        part = text.at(floor)
        merges = learn(part.ids, part.joined, part.counts, asked, floor)
        complete = len({left + right for left, right in merges}) == asked
        if complete or floor == MIN_COUNT:
            return merges, complete
        floor = max(MIN_COUNT, floor // _HEADROOM)


def _first_floor(counts: np.ndarray, asked: int) -> int:
    """A count that ``asked`` merges are likely to reach, from how often pairs of tokens meet."""
    frequent = np.partition(counts, -asked)[-asked] // _HEADROOM if len(counts) > asked else 0
    return max(MIN_COUNT, int(frequent), int(counts.sum()) // (_EVEN * asked))
