"""Safety evaluation: a small K-AUT taxonomy, a KGC-Safety style set, safe rate with bounds.

    taxonomy   4 domains > risk areas > 5 criteria each
    set        per area 4 naive, 2 adversarial, 2 multi-turn and 2 multilingual items
    safe rate  share of responses that a judge labels safe

With s safe, u unparsed and n responses the safe rate lies between s/n (unparsed counted unsafe) and
(s + u)/n (counted safe). Each bound has its Wilson interval; where they differ much, the judge is
what limits the measurement, not the model.

reported: 226 areas (55, 75, 60, 36 a domain), 10 items each, 2,260 in all; the metric. chosen: 12
areas and their items in ``safety.toml``, see there; the bounds; over-refusal on harmless questions
that share an area's words, because a model that declines everything has a perfect safe rate and no
use.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kexa.eval.judge import Judge, Label, declines
from kexa.statistics import Interval, wilson

DOMAINS = ("Universal Human Values", "Social Safety", "Korean Sensitivity", "Future Risk")
LANGUAGES = ("ko", "en", "es", "de", "ja", "vi")
PER_AREA = {"naive": 4, "adversarial": 2, "multi-turn": 2, "multilingual": 2}
REPORTED_AREAS = {DOMAINS[0]: 55, DOMAINS[1]: 75, DOMAINS[2]: 60, DOMAINS[3]: 36}
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Area:
    """One risk area of the taxonomy."""

    domain: str
    name: str
    source: str  # "reported" or "chosen": where the name comes from
    description: str
    criteria: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One conversation to answer. ``kind`` is a key of :data:`PER_AREA`, or "benign"."""

    area: Area
    kind: str
    language: str
    messages: tuple[Message, ...]

    @property
    def query(self) -> str:
        """What the judge sees as the query: all turns, because a multi-turn item needs them."""
        return "\n".join(m["content"] for m in self.messages)


@dataclass(frozen=True)
class Judged:
    """An item, what a model said, and the label."""

    item: Item
    response: str
    label: Label


@dataclass(frozen=True)
class SafeRate:
    """Counts of one group of items; ``low`` counts unparsed as unsafe, ``high`` as safe."""

    counts: Counter[Label]

    @property
    def n(self) -> int:
        return self.counts.total()

    @property
    def low(self) -> Interval:
        return wilson(self.counts["safe"], self.n)

    @property
    def high(self) -> Interval:
        return wilson(self.counts["safe"] + self.counts["unparsed"], self.n)


def load(path: Path | None = None) -> tuple[list[Area], list[Item]]:
    """Areas and items, the benign ones included, of a taxonomy file (default: ``safety.toml``).

    Raises:
        ValueError: an area with a wrong number of criteria or items, an unknown domain or language.
    """
    path = path or Path(__file__).with_name("safety.toml")
    areas, items = [], []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["area"]:
        area = Area(
            entry["domain"], entry["name"], entry["source"], entry["description"],
            tuple(entry["criteria"]),
        )  # fmt: skip
        mine = list(_items(area, entry))
        _check(area, mine)
        areas.append(area)
        items += mine
    return areas, items


def harmless_questions() -> list[str]:
    """English questions that nobody need decline."""
    path = Path(__file__).with_name("safety.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))["harmless"]


def _items(area: Area, entry: Mapping[str, Any]) -> Iterable[Item]:
    for kind in ("naive", "adversarial"):
        for i, text in enumerate(entry[kind]):
            yield Item(area, kind, ("ko", "en")[i % 2], _turns([text]))
    for i, turns in enumerate(entry["multi_turn"]):
        yield Item(area, "multi-turn", ("ko", "en")[i % 2], _turns(turns))
    for case in entry["multilingual"]:
        yield Item(area, "multilingual", case["language"], _turns([case["text"]]))
    for i, text in enumerate(entry["benign"]):
        yield Item(area, "benign", ("en", "ko")[i % 2], _turns([text]))


def _turns(texts: Sequence[str]) -> tuple[Message, ...]:
    """User and assistant alternate, the user first and last."""
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))


def _check(area: Area, items: Sequence[Item]) -> None:
    if area.domain not in DOMAINS:
        raise ValueError(f"area {area.name!r}: no domain {area.domain!r}; use {', '.join(DOMAINS)}")
    if len(area.criteria) != 5:
        raise ValueError(f"area {area.name!r} has {len(area.criteria)} criteria; five are needed")
    counts = Counter(item.kind for item in items)
    for kind, wanted in PER_AREA.items():
        if counts[kind] != wanted:
            raise ValueError(
                f"area {area.name!r} has {counts[kind]} {kind} items; {wanted} are needed"
            )
    for item in items:
        if item.language not in LANGUAGES:
            raise ValueError(f"area {area.name!r}: no language {item.language!r}")
        if len(item.messages) % 2 == 0:
            raise ValueError(
                f"area {area.name!r}: a {item.kind} item must end with the user's turn"
            )


def judge_all(items: Sequence[Item], responses: Sequence[str], judge: Judge) -> list[Judged]:
    """Label one response per item.

    Raises:
        ValueError: another number of responses than of items.
    """
    if len(responses) != len(items):
        raise ValueError(f"{len(responses)} responses to {len(items)} items")
    return [
        Judged(item, response, judge(item.query, response, item.area.criteria))
        for item, response in zip(items, responses, strict=True)
    ]


def safe_rate(
    judged: Iterable[Judged], by: Callable[[Item], str] = lambda item: "total"
) -> dict[str, SafeRate]:
    """Safe rate of the harmful items by group, in order of first appearance."""
    groups: dict[str, Counter[Label]] = {}
    for one in judged:
        if one.item.kind != "benign":
            groups.setdefault(by(one.item), Counter())[one.label] += 1
    return {name: SafeRate(counts) for name, counts in groups.items()}


def over_refusal(judged: Iterable[Judged]) -> Interval:
    """Share of harmless questions that the model declined, with Wilson's interval.

    Raises:
        ValueError: no benign items.
    """
    benign = [one for one in judged if one.item.kind == "benign"]
    if not benign:
        raise ValueError("no benign items: over-refusal cannot be measured")
    return wilson(sum(declines(one.response) for one in benign), len(benign))
