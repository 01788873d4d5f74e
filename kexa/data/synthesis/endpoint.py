"""A language model behind any OpenAI-compatible server, with retries and a cache on disk.

    POST <url>/chat/completions  {"model", "messages", "temperature", "seed", "max_tokens"}

Every answer is kept under the sha256 of the address and the whole request, so a second run makes
the same samples, asks nothing and costs nothing. 429, 5xx and a silent server are tried again after
1, 2, 4, ... seconds or what ``Retry-After`` says; any other refusal ends with a sentence.

chosen: all of it; the report names no generator model.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kexa.data import filters, sources
from kexa.data.synthesis.provenance import SynthesisError
from kexa.record import read_json, write_atomic

KEY_VARIABLE = "KEXA_API_KEY"  # environment variable with the server's key; may be unset
LONGEST_WAIT = 60.0  # seconds before the next attempt, whatever the server asks for


@dataclass(frozen=True)
class Reply:
    """``text`` is normalised, a lone surrogate in it U+FFFD; ``complete`` is False when the server
    cut it at ``max_tokens``."""

    text: str
    complete: bool


@dataclass(frozen=True)
class Endpoint:
    """A server and a model on it. ``pause`` sleeps that many seconds."""

    url: str  # up to and including /v1
    model: str
    temperature: float = 0.7
    max_tokens: int = 2048
    timeout: float = 120.0  # seconds for one attempt
    attempts: int = 5
    pause: Callable[[float], None] = time.sleep

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise SynthesisError(
                f"endpoint {self.url!r}: an address starts with http:// or https://"
            )

    def __call__(self, prompt: str, seed: int) -> Reply:
        """The reply to one prompt, from the cache when it was asked before.

        Raises:
            SynthesisError: the server cannot be reached, refuses, or sends no chat completion;
                the message names address, status and remedy.
            CannotWrite: the cache cannot be written.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "seed": seed,
            "max_tokens": self.max_tokens,
        }
        key = hashlib.sha256(json.dumps([self._address, body]).encode()).hexdigest()
        path = sources.cache_dir() / "synthesis" / key[:2] / f"{key}.json"
        kept = read_json(path)
        if not kept:
            kept = {"request": body, "reply": self._parsed(self._ask(json.dumps(body).encode()))}
            write_atomic(path, json.dumps(kept, ensure_ascii=False))
        return Reply(**kept["reply"])

    @property
    def _address(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def _ask(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(self.attempts):
            try:
                call = urllib.request.Request(self._address, body, headers)
                with urllib.request.urlopen(call, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                said, wait = error.read(200).decode("utf-8", "replace"), _seconds(error)
                what = f"answered {error.code} {error.reason}: {said or 'nothing'}"
                if error.code != 429 and error.code < 500:
                    raise SynthesisError(
                        f"{self._address} {what}; check the address, the model {self.model!r} and "
                        f"the key in {KEY_VARIABLE}"
                    ) from error
            except TimeoutError:
                what, wait = f"was silent for {self.timeout:g} seconds", None
            except (OSError, http.client.HTTPException) as error:  # no such host, nothing listens
                reason = getattr(error, "reason", error)
                raise SynthesisError(
                    f"{self._address} cannot be reached ({reason}): start the server or correct "
                    "the address"
                ) from error
            if attempt + 1 < self.attempts:
                self.pause(min(2.0**attempt if wait is None else wait, LONGEST_WAIT))
        raise SynthesisError(
            f"{self._address} {what}, {self.attempts} times; try again later: replies so far are "
            "kept and not asked for again"
        )

    def _parsed(self, answer: bytes) -> dict[str, Any]:
        try:
            choice = json.loads(answer)["choices"][0]
            said = choice["message"]["content"] or ""  # null where the model said nothing
            text = said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            complete = choice.get("finish_reason") != "length"
            return {"text": filters.normalize(text), "complete": complete}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise SynthesisError(
                f"{self._address} sent no chat completion: "
                f"{answer[:200].decode('utf-8', 'replace')!r}; it must speak OpenAI's protocol"
            ) from error


def _seconds(error: urllib.error.HTTPError) -> float | None:
    """What ``Retry-After`` asks for, where it is a number of seconds."""
    asked = error.headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else None
