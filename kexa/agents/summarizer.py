"""The summarizer sub-agent: condenses an opened page and answers one question about it.

reported: a sub-agent, the same model as the primary one, condenses fetched pages; in the published
example run ``open`` returns a ``Summary`` part and an ``Answer to the question`` part. Its prompt
is not published; this one is chosen. A reply without the two parts is an outcome (``followed`` is
false): the primary agent then gets the start of the page, as it would without a summarizer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kexa.agents.policies import Policy, Request

INSTRUCTION = (
    "Summarize the page and answer the question from it. Write two lines: Summary, Answer."
)
_PARTS = re.compile(r"Summary: (?P<summary>.+?)\nAnswer: (?P<answer>.+)", re.DOTALL)
EXCERPT = 400  # characters of the page that stand in for a summary that failed


@dataclass(frozen=True)
class Summary:
    """What the sub-agent made of a page."""

    text: str
    answer: str
    followed: bool

    def __str__(self) -> str:
        return f"Summary: {self.text}\nAnswer to the question: {self.answer}"


def summarize(policy: Policy, page: str, question: str) -> Summary:
    """Ask the policy for a summary of ``page`` and what it says on ``question``."""
    messages = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"Question: {question}\nPage:\n{page}"},
    ]
    [reply] = policy([Request(messages)])
    found = _PARTS.fullmatch(reply.message["content"].strip())
    if found is None:
        return Summary(page[:EXCERPT], "not found", False)
    return Summary(found["summary"].strip(), found["answer"].strip(), True)
