"""The trajectory compressor sub-agent: a long interaction becomes one JSON record.

reported: after a preset number of steps (50 of up to 500 in the report's web benchmark) the whole
interaction so far is replaced by a single JSON record of key facts from tool results and of open
questions, to keep the context short and to stop repeated calls. Field names and prompt are not
published. chosen: ``key_facts`` and ``open_questions``, two lists of strings; the record joins the
task in the user's message, and everything after it starts anew. A reply that is no such record is
an outcome: the interaction is kept as it is, and the next attempt comes after as many steps again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from kexa.agents.policies import Message, Policy, Request

INSTRUCTION = (
    "Condense the interaction into one JSON object with two lists of strings: key_facts from the "
    "tool results, and open_questions that remain."
)
NOTES = "\n\nNotes so far: "


@dataclass(frozen=True)
class Record:
    """What is worth keeping of a trajectory."""

    key_facts: tuple[str, ...]
    open_questions: tuple[str, ...]

    def to_json(self) -> str:
        record = {"key_facts": self.key_facts, "open_questions": self.open_questions}
        return json.dumps(record, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Record | None:
        """The record in a reply, or None when it is not exactly one."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            return None
        if not isinstance(found, dict) or found.keys() != {"key_facts", "open_questions"}:
            return None
        lists = (found["key_facts"], found["open_questions"])
        if not all(isinstance(x, list) and all(isinstance(s, str) for s in x) for x in lists):
            return None
        return cls(*map(tuple, lists))


class Compressor:
    """A rewrite hook for ``kexa.agents.episode.run_episodes``: compresses every ``every`` steps.

    ``records`` and ``failures`` count what its requests came to.
    """

    def __init__(self, policy: Policy, every: int):
        if every < 1:
            raise ValueError(f"every={every}: the compressor runs after at least one step")
        self.policy, self.every = policy, every
        self.records = self.failures = 0

    def __call__(self, step: int, messages: list[Message]) -> list[Message]:
        if step % self.every:
            return messages
        request = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": transcript(messages)},
        ]
        [reply] = self.policy([Request(request)])
        record = Record.from_json(reply.message["content"])
        if record is None:
            self.failures += 1
            return messages
        self.records += 1
        return rewritten(messages, record)


def rewritten(messages: Sequence[Message], record: Record) -> list[Message]:
    """The opening messages with the record in the place of everything that followed."""
    end = next(i for i, message in enumerate(messages) if message["role"] == "user")
    task = messages[end]["content"].split(NOTES)[0]
    return [*messages[:end], {"role": "user", "content": task + NOTES + record.to_json()}]


def transcript(messages: Sequence[Message]) -> str:
    """The interaction as plain text, one line per message, the system message left out."""
    lines = []
    for message in messages:
        if message["role"] == "system":
            continue
        calls = "".join(
            f" {json.dumps(c, ensure_ascii=False)}" for c in message.get("tool_calls", ())
        )
        lines.append(f"{message['role']}: {message['content']}{calls}")
    return "\n".join(lines)
