"""The search agent: a primary agent with two tools and two sub-agents, all the same policy.

    search(query)         titles of the pages that rank first for the query
    open(page, question)  the summarizer's reading of one page
    compressor            replaces the interaction by one record after every N steps

reported: this division of labour, run with a context of 128K tokens and up to 500 steps. chosen:
pages are local and ranked by BM25, so that a run needs no network and repeats; the second argument
of ``open`` is the question that the summarizer is to answer (the published example shows ``open``
with a ``pattern`` and an ``Answer to the question`` in its result).

BM25 (Robertson and Zaragoza 2009), f the count of a term in a page, n its pages of N:

    score(q, d) = sum over t in q of log(1 + (N - n + 1/2) / (n + 1/2))
                  * f (k + 1) / (f + k (1 - b + b len(d) / mean len)),   k = 1.2, b = 0.75
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kexa.agents.compressor import Compressor
from kexa.agents.episode import Episode, run_episodes
from kexa.agents.policies import Policy
from kexa.agents.summarizer import summarize
from kexa.agents.tools import Refused, Tool, Toolbox

INSTRUCTION = "Answer the question. Search for pages and open them. End with a short answer."
RESULTS = 3
_K, _B = 1.2, 0.75


@dataclass(frozen=True)
class Page:
    """A document of the local web."""

    title: str
    text: str


class Index:
    """Pages by title, ranked by BM25 over title and text."""

    def __init__(self, pages: Sequence[Page]):
        self.pages = {page.title: page for page in pages}
        if len(self.pages) != len(pages):
            raise ValueError("two pages share a title; titles are addresses and must differ")
        self._counts = {p.title: Counter(_terms(f"{p.title} {p.text}")) for p in pages}
        self._lengths = {title: counts.total() for title, counts in self._counts.items()}
        self._mean = sum(self._lengths.values()) / max(len(pages), 1)
        self._spread = Counter(term for counts in self._counts.values() for term in counts)

    def search(self, query: str, count: int = RESULTS) -> list[str]:
        """Titles with a positive score, best first; ties in alphabetical order."""
        scores = {title: self._score(title, set(_terms(query))) for title in self.pages}
        ranked = sorted(scores, key=lambda title: (-scores[title], title))
        return [title for title in ranked[:count] if scores[title] > 0]

    def _score(self, title: str, terms: set[str]) -> float:
        counts, score = self._counts[title], 0.0
        norm = _K * (1 - _B + _B * self._lengths[title] / self._mean)
        for term in sorted(terms & counts.keys()):
            n, f = self._spread[term], counts[term]
            rarity = math.log(1 + (len(self.pages) - n + 0.5) / (n + 0.5))
            score += rarity * f * (_K + 1) / (f + norm)
        return score


@dataclass(frozen=True)
class Report:
    """What became of one question."""

    question: str
    episode: Episode
    correct: bool
    summaries: int  # pages read by the summarizer
    unfollowed: int  # of those, replies without the two parts
    records: int  # successful compressions
    failures: int  # replies of the compressor that were no record


def research(
    policy: Policy,
    index: Index,
    question: str,
    expected: str,
    max_steps: int,
    compress_every: int = 0,
) -> Report:
    """Let the policy answer one question.

    Args:
        expected: the answer is right when it holds this word.
        compress_every: steps between compressions; 0 leaves the trajectory as it grows.
    """
    summaries = []

    def search(query: str) -> str:
        titles = index.search(query)
        return "\n".join(titles) if titles else "no page found"

    def open_page(page: str, question: str) -> str:
        if page not in index.pages:
            raise Refused(f"no page {page!r}")
        summaries.append(summarize(policy, index.pages[page].text, question))
        return f"{page}\n{summaries[-1]}"

    text = {"type": "string"}
    toolbox = Toolbox(
        [
            Tool("search", "Titles of pages about a query.", {"query": text}, search),
            Tool("open", "Read a page.", {"page": text, "question": text}, open_page),
        ]
    )
    compressor = Compressor(policy, compress_every) if compress_every else None
    opening = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": question},
    ]
    [episode] = run_episodes(policy, [opening], [toolbox], max_steps, compressor)
    return Report(
        question,
        episode,
        correct=expected.lower() in re.findall(r"\w+", episode.answer.lower()),
        summaries=len(summaries),
        unfollowed=sum(not summary.followed for summary in summaries),
        records=compressor.records if compressor else 0,
        failures=compressor.failures if compressor else 0,
    )


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
