"""Preference rewards: a rule where a prompt has one, and a judge's scores on a rubric.

    r_pref = rule_weight * verdict + (1 - rule_weight) * mean of the judge's scores

reported: preference rewards combine rule-based rewards and rubric-based generative rewards scored
over several dimensions; rubrics and weights are not published. chosen: the dimensions below, their
equal weight, and that a prompt without a rule is scored by the rubric alone.

A judge is a function ``(request, response, dimensions) -> {dimension: score in [0, 1]}``.
:func:`rule_judge` needs no model: it measures surface properties, which is what a model of this
size can still get wrong. It does not know whether a reply is true or kind. :class:`EndpointJudge`
puts the same questions to a language model behind any OpenAI-compatible server.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kexa.post.rewards import Check, Verdict
from kexa.post.rollout import Group
from kexa.post.rollout import judge as judge_by_rule

Judge = Callable[[str, str, Sequence[str]], Mapping[str, float]]

RUBRIC: dict[str, str] = {
    "language": "Is the reply written in the language of the request?",
    "concise": "Is the reply as short as the request allows?",
    "varied": "Is the reply free of needless repetition?",
    "on topic": "Does the reply speak about what the request mentions?",
    "well formed": "Is the reply a complete sentence with closing punctuation?",
}
CONCISE_CHARACTERS = 60  # longest reply with a full score; twice as long scores 0

_RUN = re.compile(r"[ぁ-ゟ]+|[゠-ヿ]+|[一-鿿]+|[^\W゠-ヿぁ-ゟ一-鿿]+")  # of one script
_UNSPACED = re.compile(r"[ぁ-ヿ一-鿿]")
_CONTENT = re.compile(r"[゠-ヿ]{2,}|[一-鿿]{2,}|[가-힣]{2,}|[^\W\dぁ-ヿ一-鿿가-힣]{4,}")


def preference_reward(
    verdict: Verdict | None, scores: Mapping[str, float], rule_weight: float
) -> float:
    """Combine a rule's verdict (None: the prompt has no rule) with rubric scores, all in [0, 1].

    ``preference_reward(Verdict("right"), {"a": 0.5, "b": 0.0}, 0.5)`` is 0.5 * 1 + 0.5 * 0.25 =
    0.625.
    """
    rubric = sum(scores.values()) / len(scores)
    if verdict is None:
        return rubric
    return rule_weight * verdict.reward + (1 - rule_weight) * rubric


@dataclass(frozen=True)
class Request:
    """A prompt of preference learning, with a rule for its answer where there is one."""

    text: str
    check: Check | None = None


def score_groups(
    requests: Sequence[Request], groups: Sequence[Group], judge: Judge, rule_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference rewards [Q, G] and what they are made of.

    Returns:
        The rewards, and ``{dimension: scores [Q, G]}`` with one entry ``"rule"`` that is NaN where
        a prompt has no rule.
    """
    parts: dict[str, list[list[float]]] = {name: [] for name in (*RUBRIC, "rule")}
    rewards = []
    for request, group in zip(requests, groups, strict=True):
        size = len(group.responses)
        verdicts = judge_by_rule(request.check, group) if request.check else [None] * size
        scores = [judge(request.text, r.answer, tuple(RUBRIC)) for r in group.responses]
        rewards.append(
            [preference_reward(v, s, rule_weight) for v, s in zip(verdicts, scores, strict=True)]
        )
        for name in RUBRIC:
            parts[name].append([s[name] for s in scores])
        parts["rule"].append([v.reward if v else math.nan for v in verdicts])
    return torch.tensor(rewards), {name: torch.tensor(rows) for name, rows in parts.items()}


def words(text: str) -> list[str]:
    """The words of a text; in scripts without spaces (kana, kanji) pieces of two characters."""
    found = []
    for run in _RUN.findall(text):
        step = 2 if _UNSPACED.match(run) else len(run)
        found += [run[i : i + step] for i in range(0, len(run), step)]
    return found


def rule_judge(request: str, response: str, dimensions: Sequence[str]) -> dict[str, float]:
    """Score the surface of a response; an empty one gets 0 throughout.

    Raises:
        ValueError: a dimension that no rule measures.
    """
    unknown = set(dimensions) - set(_RULES)
    if unknown:
        raise ValueError(f"no rule for {sorted(unknown)[0]!r}; use some of {', '.join(_RULES)}")
    if not words(response):
        return dict.fromkeys(dimensions, 0.0)
    return {d: _RULES[d](request, response) for d in dimensions}


def _language(request: str, response: str) -> float:
    """Share of the reply's letters that are in a script of the request; 1 for numbers alone."""
    wanted = set(_scripts(request))
    letters = _scripts(response)
    return sum(s in wanted for s in letters) / len(letters) if letters else 1.0


def _concise(request: str, response: str) -> float:
    return min(1.0, max(0.0, 2 - len(response) / CONCISE_CHARACTERS))


def _varied(request: str, response: str) -> float:
    """Share of different words among all."""
    found = words(response.casefold())
    return len(set(found)) / len(found)


def _on_topic(request: str, response: str) -> float:
    """1 when the reply takes up a word of the request.

    Words that count have four letters or more; in hangul, kanji and katakana two. Hiragana is left
    out: it mostly writes grammar.
    """
    asked, said = (set(_CONTENT.findall(text.casefold())) for text in (request, response))
    return float(bool(asked & said))


def _well_formed(request: str, response: str) -> float:
    return float(response.rstrip()[-1:] in tuple(".!?。！？"))


_RULES: dict[str, Callable[[str, str], float]] = {
    "language": _language,
    "concise": _concise,
    "varied": _varied,
    "on topic": _on_topic,
    "well formed": _well_formed,
}


def _scripts(text: str) -> list[str]:
    """The script of every letter: the first word of its Unicode name, kana and kanji as one."""
    names = [unicodedata.name(c, "?").split()[0] for c in text if c.isalpha()]
    return ["JAPANESE" if n in ("HIRAGANA", "KATAKANA", "CJK") else n for n in names]


def complete(url: str, model: str, api_key: str, timeout: float, prompt: str) -> str:
    """The reply of an OpenAI-compatible ``/chat/completions`` to one prompt, at temperature 0.

    Raises:
        OSError: the server cannot be reached within ``timeout`` seconds.
    """
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    call = urllib.request.Request(
        f"{url.rstrip('/')}/chat/completions",
        data=json.dumps(body).encode("utf-8"),
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"},
    )
    with urllib.request.urlopen(call, timeout=timeout) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


@dataclass(frozen=True)
class EndpointJudge:
    """A language model behind an OpenAI-compatible ``/chat/completions`` as the judge.

    The model gets request, response and the questions of :data:`RUBRIC` and answers with one JSON
    object of scores from 0 to 10. Calling it raises :class:`ValueError` when the answer is not
    that, and :class:`OSError` when the server cannot be reached: a missing score is never taken for
    a bad one.
    """

    url: str  # up to and including /v1
    model: str
    api_key: str = ""
    timeout: float = 60.0  # seconds

    def __call__(self, request: str, response: str, dimensions: Sequence[str]) -> dict[str, float]:
        questions = "\n".join(f"- {d}: {RUBRIC[d]}" for d in dimensions)
        prompt = (
            "Score the reply on each question from 0 (not at all) to 10 (fully). Answer with one "
            "JSON object that maps each name to its score, nothing else.\n\n"
            f"Questions:\n{questions}\n\nRequest:\n{request}\n\nReply:\n{response}"
        )
        content = complete(self.url, self.model, self.api_key, self.timeout, prompt)
        return _scores(content, dimensions)


def _scores(content: str, dimensions: Sequence[str]) -> dict[str, float]:
    found = re.search(r"\{.*\}", content, re.DOTALL)
    try:
        values = json.loads(found[0]) if found else {}
    except json.JSONDecodeError:
        values = {}
    scores = {d: values.get(d) for d in dimensions}
    if not all(isinstance(s, int | float) and 0 <= s <= 10 for s in scores.values()):
        raise ValueError(
            f"the judge answered {content[:200]!r}; expected JSON with a score from 0 to 10 for "
            f"each of {', '.join(dimensions)}"
        )
    return {d: s / 10 for d, s in scores.items()}
