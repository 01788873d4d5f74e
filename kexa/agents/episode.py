"""The episode loop: a policy and its tools take turns until an answer, a limit or a full context.

    messages -> policy -> tool calls? -> results appended -> policy -> ... -> answer

Everything a policy can do wrong is an outcome of the episode, not an exception: a tool call that
is no call is answered with an error and counted, and so is a call that its tool refuses. A hook may
rewrite the conversation between steps; the trajectory compressor is one.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kexa.agents.policies import Message, Policy, Request
from kexa.agents.tools import Toolbox

NOT_A_CALL = "error: that was no tool call; write one JSON object with name and arguments"
Rewrite = Callable[[int, list[Message]], list[Message]]


class StopReason(enum.Enum):
    """Why an episode ended."""

    ANSWERED = "answered"  # a reply without a tool call
    STEP_LIMIT = "step limit"  # the last step allowed was still a tool call
    CUT_OFF = "cut off"  # a reply ran into its token limit
    CONTEXT_FULL = "context full"  # the conversation left no room for a reply


@dataclass(frozen=True)
class Call:
    """A tool call that was made, and whether the tool carried it out."""

    name: str
    arguments: dict[str, Any]
    ok: bool

    @property
    def key(self) -> str:
        """Equal for calls with the same name and arguments."""
        return json.dumps([self.name, self.arguments], sort_keys=True, ensure_ascii=False)


@dataclass
class Episode:
    """What happened. ``messages`` is the conversation as it stands, after any rewriting."""

    messages: list[Message]
    stop: StopReason | None = None
    answer: str = ""
    calls: list[Call] = field(default_factory=list)
    malformed: int = 0  # replies that tried to call a tool and were no call

    @property
    def refused(self) -> int:
        """Calls that came back as errors."""
        return sum(not call.ok for call in self.calls)

    @property
    def repeated(self) -> int:
        """Calls that had been made before, word for word."""
        return len(self.calls) - len({call.key for call in self.calls})


def run_episodes(
    policy: Policy,
    conversations: Sequence[Sequence[Message]],
    toolboxes: Sequence[Toolbox],
    max_steps: int,
    rewrite: Rewrite | None = None,
) -> list[Episode]:
    """Run episodes side by side; each has its own tools and all take a step at a time.

    Args:
        conversations: the opening messages of each.
        max_steps: most replies in one episode.
        rewrite: ``(steps taken, messages) -> messages``, applied after each step.
    """
    episodes = [Episode(list(messages)) for messages in conversations]
    for step in range(1, max_steps + 1):
        going = [i for i, episode in enumerate(episodes) if episode.stop is None]
        requests = [Request(episodes[i].messages, toolboxes[i].declarations) for i in going]
        for i, reply in zip(going, policy(requests) if going else [], strict=True):
            episode = episodes[i]
            _take(episode, toolboxes[i], reply.message, reply.ending)
            if rewrite and episode.stop is None:
                episode.messages = rewrite(step, episode.messages)
    for episode in episodes:
        episode.stop = episode.stop or StopReason.STEP_LIMIT
    return episodes


def _take(episode: Episode, toolbox: Toolbox, message: Message, ending: str) -> None:
    """Append a reply and the results of its calls, or end the episode."""
    if ending != "complete":
        full = ending == "context full"
        episode.stop = StopReason.CONTEXT_FULL if full else StopReason.CUT_OFF
        return
    episode.messages.append(message)
    for each in message.get("tool_calls", ()):
        result = toolbox.call(each["name"], each["arguments"])
        episode.calls.append(Call(each["name"], dict(each["arguments"]), result.ok))
        episode.messages.append({"role": "tool", "content": result.content})
    if "<tool_call>" in message["content"]:
        episode.malformed += 1
        episode.messages.append({"role": "tool", "content": NOT_A_CALL})
    elif not message.get("tool_calls"):
        episode.stop, episode.answer = StopReason.ANSWERED, message["content"]
