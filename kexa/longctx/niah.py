"""Needle in a haystack: can one fact be retrieved from anywhere in a long text?

A task is a prompt of held-out text in which one line, the needle, states a fact, and which ends
by asking for it:

    [BOS] text ... \\n  wheel = 73  \\n ... text \\n  wheel =            answer:  73

Prompt and answer together have exactly ``length`` tokens, however the tokenizer cuts them. Of the
``free`` tokens of text, ``round(depth * free)`` stand before the needle: depth 0 is the beginning,
depth 1 the end. With ``distractors`` the text holds further facts under other keys, at random
places, and the key has to be read, not just the form of the line (RULER's multi-key task).

An answer counts when greedy decoding gives all its tokens. That is decided in one pass over
prompt and answer: greedy decoding reproduces the answer exactly if each of its tokens is the
argmax given the true ones before it.

The gate opens when accuracy, pooled over depths, reaches the threshold at every length up to the
target. reported: training goes on until NIAH is near-perfect over the target range. not reported:
threshold, depths, needles. chosen: all three; keys that no training document uses; Wilson
intervals at 95%.

Legend: B tasks, T tokens, A answer tokens; D depths, L lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from kexa.data import TokenizedDocuments, synthesis
from kexa.model import KexaForCausalLM
from kexa.statistics import Interval, wilson


@dataclass(frozen=True)
class Task:
    """One prompt and the tokens that must follow it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    key: str
    value: str


@dataclass(frozen=True)
class Fact:
    """The tokens of a stated fact: ``cue`` asks, ``value`` answers, each line feed is its own."""

    cue: list[int]
    value: list[int]
    end: list[int]

    @property
    def line(self) -> list[int]:
        """The fact as a line of its own, without the line feed before it."""
        return self.cue + self.value + self.end


class Facts:
    """Facts in tokens. The parts are encoded apart, so a cue is always a prefix of its fact.

    ``line feed + cue`` is encoded together and so is ``space + value``, as they would be in a
    text whose tokenizer ends a token at each of these places.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.bos = tokenizer.token_to_id("[BOS]")
        if self.bos is None:
            raise ValueError("the tokenizer has no [BOS] token; use one made by kexa.tokenizer")

    def __call__(self, key: str, value: str) -> Fact:
        return Fact(
            self._encode("\n" + synthesis.cue(key)), self._encode(f" {value}"), self._encode("\n")
        )

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]


def make_tasks(
    tokenizer: Tokenizer,
    haystack: TokenizedDocuments,
    length: int,
    depth: float,
    count: int,
    seed: int,
    digits: int = 2,
    distractors: int = 0,
) -> list[Task]:
    """``count`` tasks of exactly ``length`` tokens, prompt and answer together.

    Args:
        haystack: the text around the needle; a task takes consecutive tokens from a random place,
            over document borders if it must.
        depth: where the needle stands, 0 (beginning) to 1 (end).
        digits: digits of a value.
        distractors: facts with other keys in the same text.

    Raises:
        ValueError: a depth outside 0..1, a length too short for needle and question, more keys
            than there are, or a haystack shorter than the text.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie in 0..1")
    if distractors >= len(synthesis.PROBE_KEYS):
        raise ValueError(
            f"distractors={distractors}: there are {len(synthesis.PROBE_KEYS)} keys in all"
        )
    facts = Facts(tokenizer)
    rng = np.random.default_rng([seed, length, round(depth * 1e6), distractors])
    return [
        _task(facts, haystack.tokens, length, depth, digits, distractors, rng) for _ in range(count)
    ]


def _task(facts, text, length, depth, digits, distractors, rng) -> Task:
    keys = rng.choice(synthesis.PROBE_KEYS, size=distractors + 1, replace=False)
    values = ["".join(map(str, row)) for row in rng.integers(0, 10, size=(len(keys), digits))]
    stated = [facts(key, value) for key, value in zip(keys, values, strict=True)]
    needle = stated[0]
    free = length - 1 - sum(len(f.line) for f in stated) - len(needle.cue) - len(needle.value)
    if free < 0:
        raise ValueError(f"length={length} is {-free} tokens too short for facts and question")
    if free > len(text):
        raise ValueError(
            f"length={length} needs {free} tokens of text, the haystack has {len(text)}"
        )
    start = rng.integers(len(text) - free + 1)
    hay = text[start : start + free].tolist()
    places = [round(depth * free), *rng.integers(0, free + 1, size=distractors).tolist()]
    body = insert(hay, [f.line for f in stated], places)
    prompt = (facts.bos, *body, *needle.cue)
    return Task(prompt, tuple(needle.value), str(keys[0]), values[0])


def insert(text: list[int], pieces: Sequence[list[int]], places: Sequence[int]) -> list[int]:
    """Put ``pieces[i]`` before ``text[places[i]]``; pieces at one place keep their order."""
    out, at = [], 0
    for i in np.argsort(places, kind="stable"):
        out += text[at : places[i]] + pieces[i]
        at = places[i]
    return out + text[at:]


@torch.no_grad()
def score(model: KexaForCausalLM, tasks: Sequence[Task], batch_tokens: int = 8192) -> np.ndarray:
    """Whether greedy decoding gives each task's whole answer: bool [tasks].

    Args:
        batch_tokens: about how many tokens are read in one pass; tasks of one length share it.
    """
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    hits = np.zeros(len(tasks), dtype=bool)
    shapes = [(len(t.prompt), len(t.answer)) for t in tasks]
    for prompt, answer in sorted(set(shapes)):
        same = [i for i, shape in enumerate(shapes) if shape == (prompt, answer)]
        rows = max(1, batch_tokens // (prompt + answer))
        for batch in (same[i : i + rows] for i in range(0, len(same), rows)):
            ids_BT = torch.tensor([tasks[i].prompt + tasks[i].answer for i in batch], device=device)
            hidden_BTD = model.hidden_states(ids_BT[:, :-1])
            guess_BA = model.lm_head(hidden_BTD[:, -answer:]).argmax(-1)
            hits[batch] = (guess_BA == ids_BT[:, -answer:]).all(-1).cpu().numpy()
    model.train(was_training)
    return hits


@dataclass(frozen=True)
class Grid:
    """Successes by depth and length: ``hits`` int [D, L], each of ``trials`` tasks."""

    depths: tuple[float, ...]
    lengths: tuple[int, ...]
    hits: np.ndarray
    trials: int

    @property
    def accuracy(self) -> np.ndarray:
        """Share of successes [D, L]."""
        return self.hits / self.trials

    def at(self, length: int) -> Interval:
        """Accuracy at one length, pooled over depths, with its Wilson interval."""
        column = self.hits[:, self.lengths.index(length)]
        return wilson(int(column.sum()), self.trials * len(self.depths))


def measure(
    model: KexaForCausalLM,
    tokenizer: Tokenizer,
    haystack: TokenizedDocuments,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int,
    digits: int = 2,
    distractors: int = 0,
) -> Grid:
    """Score ``count`` tasks in every cell of depths x lengths. Equal seeds give equal tasks."""
    hits = np.zeros((len(depths), len(lengths)), dtype=np.int64)
    for column, length in enumerate(lengths):
        cells = [
            make_tasks(tokenizer, haystack, length, depth, count, seed, digits, distractors)
            for depth in depths
        ]
        found = score(model, [task for cell in cells for task in cell])
        hits[:, column] = found.reshape(len(depths), count).sum(1)
    return Grid(tuple(depths), tuple(lengths), hits, count)


@dataclass(frozen=True)
class Verdict:
    """The gate's decision and the length that decided it."""

    green: bool
    length: int
    accuracy: Interval


def gate(grid: Grid, threshold: float, target: int) -> Verdict:
    """Green if pooled accuracy is at least ``threshold`` at every length up to ``target``.

    Raises:
        ValueError: the grid does not hold the target length.
    """
    if target not in grid.lengths:
        raise ValueError(
            f"the grid has no length {target}; it has {', '.join(map(str, grid.lengths))}"
        )
    worst = min((n for n in grid.lengths if n <= target), key=lambda n: grid.at(n).estimate)
    return Verdict(grid.at(worst).estimate >= threshold, worst, grid.at(worst))
