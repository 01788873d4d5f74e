"""Byte-pair encoding on the stock ``tokenizers`` library, with the one thing it lacks: resuming.

The library trains BPE only from single characters. To continue from an existing vocabulary we

1. encode the text with the tokenizer so far, each distinct pre-token once,
2. write each token id ``i`` as the one character ``U+10000 + i`` (room for 1,048,576 ids),
3. train a plain BPE on those strings, cut where no merge may happen, and
4. translate its merges back to byte-level strings and append them.

BPE applies merges in rank order, so appended merges act on exactly the segmentation they were
learned from.

What is cut, and why nothing that is learned changes. A merge across a boundary needs its two tokens
to meet there, so it is never more frequent than they are: where two tokens meet less than ``floor``
times no merge of count ``floor`` or more can cross. We cut there and let the trainer stop at that
count. When it finds as many merges as asked, all of them are at least that frequent and it would
have found the same without cuts; when not, ``floor`` is lowered, to ``MIN_COUNT`` in the end. What
is left are short strings that repeat, and the trainer holds each distinct one once: memory follows
the number of distinct frequent phrases, not the length of the text.
"""

from __future__ import annotations

import contextlib
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

_FIRST_CHARACTER = 0x10000  # above the surrogates, which are no characters
_MAX_IDS = 0x110000 - _FIRST_CHARACTER
_CUT = " "
_DECODER = decoders.ByteLevel()
_CHARACTERS_PER_STRING = 1 << 16
_HEADROOM = 4  # the first floor is this fraction of a guess, so that it rarely has to be lowered


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


def whole(vocab: list[str], merges: list[Merge]) -> Tokenizer:
    """A tokenizer that reads each text as one pre-token and changes and adds nothing."""
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
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
            f"cannot resume from {len(vocab)} tokens: there are characters for {_MAX_IDS}; lower "
            "tokenizer.vocab_size"
        )
    asked, more, learned = count, True, []
    while more and len(learned) < count:
        asked *= 2  # room for refused tokens and for strings that are tokens already
        on_ids, more = _train_on_ids(text, len(vocab), asked)
        found = [(_text(a, vocab), _text(b, vocab)) for a, b in on_ids]
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


def _train_on_ids(text: Encoded, num_ids: int, asked: int) -> tuple[list[Merge], bool]:
    """Merges of plain BPE on strings of one character per token, and whether they are all asked.

    The merges make at most ``asked`` tokens; two of them may make the same one.
    """
    where = np.flatnonzero(text.joined)
    pairs = text.ids[where].astype(np.int64) * num_ids + text.ids[where + 1]
    _, which = np.unique(pairs, return_inverse=True)
    counts = np.bincount(which, weights=text.counts[where]).astype(np.int64)  # by distinct pair
    meet = np.zeros(len(text.ids), dtype=np.int64)  # how often tokens i and i + 1 meet
    meet[where] = counts[which]
    floor = _first_floor(counts, asked)
    while True:
        merges = _train_above(text, meet >= floor, asked, floor)
        complete = len({left + right for left, right in merges}) == asked
        if complete or floor == MIN_COUNT:
            return merges, complete
        floor = max(MIN_COUNT, floor // _HEADROOM)


def _first_floor(counts: np.ndarray, asked: int) -> int:
    """A count that ``asked`` merges are likely to reach, from how often pairs of tokens meet."""
    if len(counts) <= asked:
        return MIN_COUNT
    return max(MIN_COUNT, int(np.partition(counts, -asked)[-asked]) // _HEADROOM)


def _train_above(text: Encoded, joined: np.ndarray, asked: int, floor: int) -> list[Merge]:
    alphabet = np.unique(text.ids[joined | _shifted(joined)])
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_CUT, behavior="removed")
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + asked,
        min_frequency=floor,
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_strings(text, joined), trainer)
    return parts(tokenizer)[1]


def _strings(text: Encoded, joined: np.ndarray) -> Iterator[str]:
    """The joined runs in those characters, each as often as it occurs, ``_CUT`` after each."""
    keep = np.flatnonzero(joined | _shifted(joined))
    characters = text.ids[keep].astype(np.uint32) + _FIRST_CHARACTER
    row = characters.astype("<u4").tobytes().decode("utf-32-le")
    ends = np.flatnonzero(~joined[keep]) + 1  # a run ends at a token not joined to the next
    starts = np.concatenate([[0], ends])[: len(ends)]
    pieces, size = [], 0
    for start, end, count in zip(
        starts.tolist(), ends.tolist(), text.counts[keep][ends - 1].tolist(), strict=True
    ):
        pieces.append((row[start:end] + _CUT) * count)
        size += len(pieces[-1])
        if size >= _CHARACTERS_PER_STRING:
            yield "".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield "".join(pieces)


def _shifted(joined: np.ndarray) -> np.ndarray:
    """``[i]``: token i is joined to the token before it."""
    return np.concatenate([[False], joined[:-1]]).astype(bool)
