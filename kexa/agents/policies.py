"""Policies: whatever answers a conversation, behind one function.

    policy(requests) -> replies        a batch of conversations in, one assistant message each out

    ModelPolicy      our model with the chat template; reports a full context instead of raising
    EndpointPolicy   any server that speaks the OpenAI chat protocol
    ScriptedPolicy   Python code that plays the assistant: oracles and simulated agents
    silent, Guesser  the two baselines that must fail: no answer, random calls
    ShortMemory      any policy, seeing only the most recent messages that fit a token budget
    Meter            any policy, counting the tokens it is sent

Batching matters on small machines: all episodes of a set take their next step in one call.
"""

from __future__ import annotations

import hashlib
import json
import random
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from kexa.data.chat import encode_chat, parse_reply
from kexa.model import KexaForCausalLM, StopReason, sample

Message = Mapping[str, Any]
Ending = Literal["complete", "cut off", "context full"]


@dataclass(frozen=True)
class Request:
    """A conversation to continue; ``tools`` are declarations as in ``Tool.declaration``."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Reply:
    """An assistant message (``content``, perhaps ``tool_calls``) and whether it is all there."""

    message: Message
    ending: Ending = "complete"


Policy = Callable[[Sequence[Request]], list[Reply]]
Script = Callable[[Request], Iterator[Message]]
Count = Callable[[Sequence[Message]], int]


def say(content: str) -> Message:
    """An assistant message that answers."""
    return {"role": "assistant", "content": content}


def call(name: str, **arguments: Any) -> Message:
    """An assistant message that calls one tool."""
    tool_calls = [{"name": name, "arguments": arguments}]
    return {"role": "assistant", "content": "", "tool_calls": tool_calls}


class ModelPolicy:
    """Samples replies in non-reasoning mode (reported: the search agent is run in that mode).

    A conversation that leaves no room for ``max_new_tokens`` in ``context`` tokens is not sent to
    the model: its reply is empty and ends with ``"context full"``.
    """

    def __init__(
        self,
        model: KexaForCausalLM,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        context: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.context = max_new_tokens, context
        self.temperature, self.generator = temperature, generator

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        replies = [Reply(say(""), "context full") for _ in requests]
        prompts = [
            encode_chat(self.tokenizer, r.messages, r.tools or None, True, enable_thinking=False)[0]
            for r in requests
        ]
        room = self.context - self.max_new_tokens
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        self.model.eval()
        completions = sample(
            self.model,
            [prompts[i] for i in fitting],
            self.max_new_tokens,
            self.temperature,
            stop_ids=(self.model.config.eos_token_id,),
            generator=self.generator,
        )
        for i, completion in zip(fitting, completions, strict=True):
            message = parse_reply(self.tokenizer, completion.tokens, enable_thinking=False)
            stopped = completion.stop_reason is StopReason.STOP
            replies[i] = Reply(message, "complete" if stopped else "cut off")
        return replies


class EndpointPolicy:
    """Asks a server at ``<url>/chat/completions``; ``extra`` is merged into each request body.

    Raises:
        OSError: the server cannot be reached or refuses the request.
        ValueError: its answer is not a chat completion.
    """

    def __init__(self, url: str, model: str, key: str = "", timeout: float = 600.0, **extra: Any):
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.timeout, self.extra = timeout, extra

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        return [self._ask(request) for request in requests]

    def _ask(self, request: Request) -> Reply:
        body: dict[str, Any] = {"model": self.model, "messages": _to_protocol(request.messages)}
        if request.tools:
            body["tools"] = [{"type": "function", "function": dict(t)} for t in request.tools]
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        http = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body | self.extra).encode(), headers
        )
        with urllib.request.urlopen(http, timeout=self.timeout) as response:
            answer = json.load(response)
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise ValueError(f"{self.url} sent no chat completion: {str(answer)[:200]}")
        [choice] = answer["choices"]
        cut_off = choice.get("finish_reason") == "length"
        return Reply(_from_protocol(choice["message"]), "cut off" if cut_off else "complete")


class ScriptedPolicy:
    """Plays a generator: it yields assistant messages and is sent each tool result.

    The script is replayed from the messages at every step, so the policy holds no state and, like a
    model, knows only what the conversation shows.
    """

    def __init__(self, script: Script):
        self.script = script

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        return [Reply(self._next(request)) for request in requests]

    def _next(self, request: Request) -> Message:
        steps = self.script(request)
        message = next(steps)
        for result in (m["content"] for m in request.messages if m["role"] == "tool"):
            message = steps.send(result)
        return message


def silent(requests: Sequence[Request]) -> list[Reply]:
    """Answers every conversation with nothing."""
    return [Reply(say("")) for _ in requests]


class Guesser:
    """Calls random tools with random arguments, then answers with a random word or number.

    Arguments fit their schemas; words and numbers are drawn from the conversation itself, which is
    what makes a lucky guess possible. Equal conversations and seeds give equal guesses.
    """

    def __init__(self, seed: int, calls: int = 3):
        self.seed, self.calls = seed, calls

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        return [Reply(self._guess(request)) for request in requests]

    def _guess(self, request: Request) -> Message:
        seen = json.dumps([dict(m) for m in request.messages], sort_keys=True)
        rng = random.Random(hashlib.sha256(f"{self.seed} {seen}".encode()).digest())
        text = " ".join(m["content"] for m in request.messages if m["role"] != "system")
        words = ["".join(c for c in word if c.isalnum()) for word in text.split()]
        words = sorted({word for word in words if word})
        made = sum(m["role"] == "tool" for m in request.messages)
        if made >= self.calls or not request.tools:
            return say(rng.choice(words))
        tool = rng.choice(list(request.tools))
        numbers = sorted({int(word) for word in words if word.isdecimal()} | {0, 1})
        arguments = {
            name: rng.choice(numbers) if schema["type"] == "integer" else rng.choice(words)
            for name, schema in tool["parameters"]["properties"].items()
        }
        return call(tool["name"], **arguments)


class Meter:
    """Passes requests on and keeps their sizes in ``sent``, in order.

    Args:
        count: tokens of a list of messages.
    """

    def __init__(self, policy: Policy, count: Count):
        self.policy, self.count = policy, count
        self.sent: list[int] = []

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        self.sent += [self.count(request.messages) for request in requests]
        return self.policy(requests)


class ShortMemory:
    """Shows a policy the system message, the task and the latest messages that fit ``tokens``.

    Args:
        count: tokens of a list of messages.
    """

    def __init__(self, policy: Policy, tokens: int, count: Count):
        self.policy, self.tokens, self.count = policy, tokens, count

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        return self.policy([replace(r, messages=self._visible(r.messages)) for r in requests])

    def _visible(self, messages: Sequence[Message]) -> list[Message]:
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0) + 1
        start, room = len(messages), self.tokens - self.count(messages[:first])
        while start > first and (size := self.count([messages[start - 1]])) <= room:
            start, room = start - 1, room - size
        return [*messages[:first], *messages[start:]]


def _to_protocol(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Our messages with call ids, which the protocol wants and our template does not."""
    made, answered, out = 0, 0, []
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            calls = []
            for each in message["tool_calls"]:
                function = {"name": each["name"], "arguments": json.dumps(each["arguments"])}
                calls.append({"id": f"call_{made}", "type": "function", "function": function})
                made += 1
            message["tool_calls"] = calls
        if message["role"] == "tool":
            message["tool_call_id"] = f"call_{answered}"
            answered += 1
        out.append(message)
    return out


def _from_protocol(message: Mapping[str, Any]) -> Message:
    content = message.get("content") or ""
    calls = []
    for each in message.get("tool_calls") or ():
        function = each["function"]
        try:
            arguments = json.loads(function["arguments"])
        except json.JSONDecodeError:
            arguments = None
        if isinstance(arguments, dict):
            calls.append({"name": function["name"], "arguments": arguments})
        else:  # as our own parser does: what is no call stays visible in the content
            content += f"<tool_call>{json.dumps(function)}</tool_call>"
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
