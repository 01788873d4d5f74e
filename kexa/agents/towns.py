"""A small local web with questions that need many pages, and an agent that can answer them.

Every town has a page: a few sentences of filler with one dated fact among them. A question names
several towns and asks which has the oldest bridge, so its answer needs all their pages at once, and
no page holds more than one of them. That is the situation which the trajectory compressor is for.

:func:`reader` is that agent as a script. It plays the primary agent, the summarizer and the
compressor, and it knows only what the conversation it is shown says. What fell out of a short
context it looks up again, as a model would.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from kexa.agents import compressor, summarizer
from kexa.agents.compressor import Record
from kexa.agents.policies import Message, Reply, Request, call, say
from kexa.agents.search import Page

_HEADS = (
    "Ar",
    "Bel",
    "Cor",
    "Dun",
    "El",
    "Fal",
    "Gal",
    "Hol",
    "Is",
    "Jor",
    "Kel",
    "Lor",
    "Mar",
    "Nor",
)
_TAILS = ("dale", "ford", "ham", "mere", "mont", "stow", "wick", "by")
_FILLER = (
    "{town} lies on a river and has a market every week.",
    "Most people in {town} work in shops, schools and small firms.",
    "The station of {town} connects it with the coast.",
    "Visitors of {town} like its gardens and the old town hall.",
    "The museum of {town} shows tools, coins and paintings.",
    "In winter the hills around {town} are covered with snow.",
)
_FACT = re.compile(r"The bridge of (\w+) was built in (\d+)\.")
_ASKED = re.compile(r"Which of these towns has the oldest bridge: ([\w, ]+)\?")


@dataclass(frozen=True)
class Question:
    """A question and the one word that answers it."""

    text: str
    answer: str


def pages(seed: int) -> list[Page]:
    """One page per town, 112 in all, with distinct years of their bridges."""
    rng = random.Random(f"towns {seed}")
    towns = [head + tail for head in _HEADS for tail in _TAILS]
    years = rng.sample(range(1100, 1990), len(towns))
    out = []
    for town, year in zip(towns, years, strict=True):
        lines = [line.format(town=town) for line in rng.sample(_FILLER, 4)]
        lines.insert(rng.randrange(5), f"The bridge of {town} was built in {year}.")
        out.append(Page(town, " ".join(lines)))
    return out


def questions(local: list[Page], count: int, towns: int, seed: int) -> list[Question]:
    """Questions about ``towns`` towns each."""
    rng = random.Random(f"questions {seed}")
    out = []
    for _ in range(count):
        picked = rng.sample(local, towns)
        oldest = min(picked, key=lambda page: int(_FACT.search(page.text)[2]))
        names = ", ".join(page.title for page in picked)
        text = f"Which of these towns has the oldest bridge: {names}?"
        out.append(Question(text, oldest.title))
    return out


def reader(requests: list[Request]) -> list[Reply]:
    """The scripted agent in all three roles; see the module header."""
    return [Reply(_reply(request)) for request in requests]


def _reply(request: Request) -> Message:
    instruction = request.messages[0]["content"]
    task = request.messages[1]["content"]
    if instruction == summarizer.INSTRUCTION:
        return say(_summary(task))
    if instruction == compressor.INSTRUCTION:
        return say(_record(task).to_json())
    text = "\n".join(message["content"] for message in request.messages)
    return next(_steps(request, text))


def _steps(request: Request, text: str) -> Iterator[Message]:
    """The next step: open what was just found, else search for what is missing, else answer."""
    towns = _towns(text)
    known = _facts(text)
    missing = [town for town in towns if town not in known]
    if not missing:
        yield say(min(towns, key=lambda town: int(known[town])))
    last = request.messages[-1]
    if last["role"] == "tool" and missing[0] in last["content"].split("\n"):
        yield call("open", page=missing[0], question=f"When was the bridge of {missing[0]} built?")
    yield call("search", query=f"bridge of {missing[0]}")


def _summary(task: str) -> str:
    page = task.split("\nPage:\n")[1]
    fact = _FACT.search(page)
    first = page.split(". ")[0].rstrip(".")
    return f"Summary: {first}.\nAnswer: {fact[0] if fact else 'not found'}"


def _record(transcript: str) -> Record:
    known = _facts(transcript)
    missing = [town for town in _towns(transcript) if town not in known]
    facts = (f"The bridge of {town} was built in {year}." for town, year in known.items())
    return Record(tuple(facts), tuple(f"When was the bridge of {town} built?" for town in missing))


def _facts(text: str) -> dict[str, str]:
    return dict(_FACT.findall(text))


def _towns(text: str) -> list[str]:
    return _ASKED.search(text)[1].split(", ")
