"""Rules that score an answer: verifiable rewards for reinforcement learning.

Every check takes the answer (the text after the think block) and returns a :class:`Verdict`: right,
wrong, or not in a form the check can read. The three are counted apart, because a policy that
forgets the format and one that cannot add need different remedies. Checks never raise, whatever
the text.

reported: rule-based verifiers; for instruction following the reward is 1 only if every constraint
holds; rewards lie in [0, 1]; mathematical answers stand in ``\\boxed{}``.
chosen: these four checks, and reward 0 for an unreadable answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Protocol

Outcome = Literal["right", "wrong", "unreadable"]

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_WORD = re.compile(r"\w+")
_SEPARATOR = re.compile(r"[,、，]")
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
    """``count`` different entries between commas, on one line. Unreadable: no word at all."""

    count: int

    def __call__(self, answer: str) -> Verdict:
        if not _WORD.search(answer):
            return Verdict("unreadable")
        entries = [e.strip(_CLOSING).casefold() for e in _SEPARATOR.split(answer)]
        holds = len(set(entries)) == len(entries) == self.count and all(map(_WORD.search, entries))
        return _verdict(holds and "\n" not in answer.strip())


@dataclass(frozen=True)
class LastWord:
    """A text that ends with ``word`` (closing punctuation aside) and says something before it."""

    word: str

    def __call__(self, answer: str) -> Verdict:
        text = answer.rstrip(_CLOSING).casefold()
        if not _WORD.search(text):
            return Verdict("unreadable")
        before = text.removesuffix(self.word.casefold())
        joined = (
            before[-1:].isascii() and before[-1:].isalnum()
        )  # "blackbird" does not end with "bird"
        return _verdict(before != text and bool(_WORD.search(before)) and not joined)
