"""Byte-pair encoding on the stock ``tokenizers`` library, with the one thing it lacks: resuming.

The library trains BPE only from single characters. To continue from an existing vocabulary we

1. encode the text with the tokenizer so far,
2. write each token id ``i`` as the one character ``U+F0000 + i`` (room for 131,072 ids),
3. train a plain BPE on those strings, cut where no merge may happen, and
4. translate its merges back to byte-level strings and append them.

BPE applies merges in rank order, so appended merges act on exactly the segmentation they were
learned from.

A merge needs its pair ``MIN_COUNT`` times, so no merge ever crosses a boundary whose two tokens
meet less often. Cutting there changes nothing that is learned and leaves short strings that repeat,
which the trainer counts once per distinct string: memory follows the number of distinct phrases,
not the length of the text.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from kexa.tokenizer.vocabulary import NUM_BYTES, SPECIAL_TOKENS

MIN_COUNT = 2  # chosen: a pair seen once is not evidence of a token
Merge = tuple[str, str]

_FIRST_CHARACTER = 0xF0000
_MAX_IDS = 0x110000 - _FIRST_CHARACTER
_CUT = " "
_DECODER = decoders.ByteLevel()
_DOCUMENTS_PER_BATCH = 512
_TOKENS_PER_STRING = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """A text as one row of token ids; ``joined[i]``: tokens i and i + 1 lie in one pre-token."""

    ids: np.ndarray  # int32 [N]
    joined: np.ndarray  # bool [N], the last entry is False


def build(vocab: list[str], merges: list[Merge], pattern: str, normalizer: str) -> Tokenizer:
    """A stock tokenizer from tokens in id order (special tokens first) and merges in rank order.

    Special tokens are matched after normalisation, so that ``decode(encode(x))`` is the normalised
    x even where a combining mark follows a special token's last character.
    """
    ids = {token: i for i, token in enumerate(vocab)}
    tokenizer = Tokenizer(BPE(vocab=ids, merges=merges))
    tokenizer.normalizer = {"NFC": normalizers.NFC, "NFKC": normalizers.NFKC}[normalizer]()
    tokenizer.pre_tokenizer = pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=True) for t in SPECIAL_TOKENS]
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
    tokenizer = build([*SPECIAL_TOKENS, *byte_alphabet()], [], pattern, normalizer)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_COUNT,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab, merges = parts(tokenizer)
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


@contextlib.contextmanager
def literal(tokenizer: Tokenizer) -> Iterator[None]:
    """Within the block the strings of special tokens are ordinary text."""
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    yield
    tokenizer.encode_special_tokens = before


def is_text(token: str) -> bool:
    """Whether a byte-level token string is whole characters, not the bytes of part of one."""
    return "\ufffd" not in _DECODER.decode([token])


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Encoded:
    """Encode all texts into one row; strings of special tokens are read as ordinary text."""
    ids, joined = [np.empty(0, np.int32)], [np.empty(0, bool)]
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _DOCUMENTS_PER_BATCH)):
        with literal(tokenizer):
            encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
        for encoding in encodings:
            words = np.array(encoding.word_ids, dtype=np.int64)
            ids.append(np.array(encoding.ids, dtype=np.int32))
            joined.append(np.append(words[1:] == words[:-1], False)[: len(words)])
    return Encoded(np.concatenate(ids), np.concatenate(joined))


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
    text: Encoded,
    count: int,
    accept: Callable[[str], bool] = lambda token: True,
) -> int:
    """Learn up to ``count`` more tokens from ``text``; append them and their merges to both lists.

    Args:
        accept: a token it refuses is left out. It must refuse whatever contains a refused token.

    Returns:
        The number learned: less than ``count`` when no further accepted pair recurs in the text.
    """
    if len(vocab) > _MAX_IDS:
        raise ValueError(
            f"cannot resume from {len(vocab)} tokens; at most {_MAX_IDS} fit the trick"
        )
    asked, found, learned = count, None, []
    while found is None or (len(learned) < count and len(found) == asked):
        asked *= 2  # room for refused tokens and for strings that are tokens already
        found = [
            (_text(a, vocab), _text(b, vocab)) for a, b in _train_on_ids(text, len(vocab), asked)
        ]
        known = set(vocab)
        tokens = dict.fromkeys(left + right for left, right in found)
        learned = [t for t in tokens if t not in known and accept(t)][:count]
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


def _text(characters: str, vocab: list[str]) -> str:
    return "".join(vocab[ord(c) - _FIRST_CHARACTER] for c in characters)


def _train_on_ids(text: Encoded, num_ids: int, count: int) -> list[Merge]:
    """Merges, at most ``count``, of plain BPE on strings of one character per token."""
    joined = _frequent(text, num_ids)
    alphabet = np.unique(text.ids[joined | _shifted(joined)])
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_CUT, behavior="removed")
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + count,
        min_frequency=MIN_COUNT,
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_strings(text.ids, joined), trainer)
    return parts(tokenizer)[1]


def _frequent(text: Encoded, num_ids: int) -> np.ndarray:
    """``joined`` without the boundaries whose tokens meet less than ``MIN_COUNT`` times."""
    where = np.flatnonzero(text.joined)
    pairs = text.ids[where].astype(np.int64) * num_ids + text.ids[where + 1]
    _, inverse, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    joined = text.joined.copy()
    joined[where] = counts[inverse] >= MIN_COUNT
    return joined


def _strings(ids: np.ndarray, joined: np.ndarray) -> Iterator[str]:
    """The joined runs as strings of private characters, separated by ``_CUT``; no lone tokens."""
    keep = np.flatnonzero(joined | _shifted(joined))
    characters = ids[keep].astype(np.uint32) + _FIRST_CHARACTER
    ends = np.flatnonzero(~joined[keep])  # a run ends at the token that is not joined to the next
    start = 0
    while start < len(ends):
        stop = min(start + _TOKENS_PER_STRING, len(ends))
        low, high = (ends[start - 1] + 1 if start else 0), ends[stop - 1] + 1
        marked = np.insert(characters[low:high], ends[start:stop] + 1 - low, ord(_CUT))
        yield marked.astype("<u4").tobytes().decode("utf-32-le")
        start = stop


def _shifted(joined: np.ndarray) -> np.ndarray:
    """``[i]``: token i is joined to the token before it."""
    return np.concatenate([[False], joined[:-1]]).astype(bool)
