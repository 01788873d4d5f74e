"""Rules that score an answer: verifiable rewards for reinforcement and preference learning.

Every check takes the answer (the text after the think block) and returns a :class:`Verdict`: right,
wrong, or not in a form the check can read. The three are counted apart, because a policy that
forgets the format and one that cannot add need different remedies. Checks never raise, whatever
the text.

reported: rule-based verifiers; for instruction following the reward is 1 only if every constraint
holds; rewards lie in [0, 1]; mathematical answers stand in ``\\boxed{}``.
chosen: these checks, and reward 0 for an unreadable answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

Outcome = Literal["right", "wrong", "unreadable"]
Layout = Literal["commas", "lines"]

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_WORD = re.compile(r"\w+")
_COMMA = re.compile(r"[,、，]")
_LINE = re.compile(r"\n")
_CLOSING = " \t\r\n.!?。！？\"'」”"


@dataclass(frozen=True)
class Verdict:
    """What a check found. ``reward`` is 1 for a right answer, else 0."""

    outcome: Outcome

    @property
    def reward(self) -> float:
        return float(self.outcome == "right")


class Check(Protocol):
    """A rule for one prompt."""

    def __call__(self, answer: str) -> Verdict: ...


def _verdict(holds: bool) -> Verdict:
    return Verdict("right" if holds else "wrong")


def _of_words(answer: str, holds: bool) -> Verdict:
    return _verdict(holds) if _WORD.search(answer) else Verdict("unreadable")


@dataclass(frozen=True)
class BoxedInteger:
    """The last ``\\boxed{}`` holds this whole number. Unreadable: no box, or no number in it."""

    value: int

    def __call__(self, answer: str) -> Verdict:
        boxes = _BOXED.findall(answer)
        content = boxes[-1].strip() if boxes else ""
        if not _INTEGER.fullmatch(content):
            return Verdict("unreadable")
        return _verdict(int(content) == self.value)


@dataclass(frozen=True)
class RepeatedWord:
    """Nothing but ``word``, ``times`` times; case and punctuation do not count."""

    word: str
    times: int

    def __call__(self, answer: str) -> Verdict:
        words = _WORD.findall(answer.casefold())
        if not words:
            return Verdict("unreadable")
        return _verdict(words == [self.word.casefold()] * self.times)


@dataclass(frozen=True)
class ListOf:
    """``count`` different entries: between commas on one line, or on lines of their own.

    Unreadable: no word at all.
    """

    count: int
    layout: Layout

    def __call__(self, answer: str) -> Verdict:
        if not _WORD.search(answer):
            return Verdict("unreadable")
        separator, other = (_COMMA, _LINE) if self.layout == "commas" else (_LINE, _COMMA)
        text = answer.strip()
        entries = [e.strip(_CLOSING).casefold() for e in separator.split(text)]
        holds = len(set(entries)) == len(entries) == self.count and all(map(_WORD.search, entries))
        return _verdict(holds and not other.search(text))


@dataclass(frozen=True)
class CountedUp:
    """The whole numbers from ``first`` to ``last`` between commas, and nothing else.

    Unreadable: no number at all.
    """

    first: int
    last: int

    def __call__(self, answer: str) -> Verdict:
        if not _INTEGER.search(answer):
            return Verdict("unreadable")
        entries = [e.strip(_CLOSING) for e in _COMMA.split(answer)]
        return _verdict(entries == [str(n) for n in range(self.first, self.last + 1)])


@dataclass(frozen=True)
class AtMostCharacters:
    """A reply of at most ``count`` characters, space around it aside. Unreadable: no word."""

    count: int

    def __call__(self, answer: str) -> Verdict:
        return _of_words(answer, len(answer.strip()) <= self.count)


@dataclass(frozen=True)
class NoCommas:
    """A reply without any comma. Unreadable: no word."""

    def __call__(self, answer: str) -> Verdict:
        return _of_words(answer, not _COMMA.search(answer))


@dataclass(frozen=True)
class EndsInQuestion:
    """A reply whose last character is a question mark. Unreadable: no word."""

    def __call__(self, answer: str) -> Verdict:
        return _of_words(answer, answer.rstrip().endswith(("?", "？")))
