"""Multiple-choice questions: exemplars of benchmarks, and questions about synthetic text.

    mmlu, kmmlu        four options    worked examples of MMLU in English, KMMLU in Korean
    mmlu_translated    four options    the same of MMLU in German and Spanish
    recall             four numbers    which of the values stated in a document belongs to a key
    arithmetic         four numbers    a sum of two numbers of up to two digits
    facts              four names      the capital of a country, in six languages in turn

The options of a synthetic question are exchangeable: four equally likely cases are drawn and one of
them, at random, is asked. So whatever answers without reading the question (always the most
frequent, the shortest, the last) scores 1/4 in expectation.

A model answers with the option of the highest log-probability per UTF-8 byte, see
:mod:`kexa.model.likelihood`.

chosen: all of it. The exemplars are worked examples that an evaluation harness ships, not the test
sets. Synthetic questions are drawn anew, recall from more documents than any run reads; but there
are only 10,000 sums, most of which a long run has met, and capitals can be known from training text
alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer

from kexa.data import sources
from kexa.data.chat import Message, encode_chat
from kexa.data.synthesis import facts as factbook
from kexa.data.synthesis import rules
from kexa.data.synthesis.problems import LANGUAGES

LETTERS = "ABCD"
OPTIONS = 4


@dataclass(frozen=True)
class Choice:
    """A question with options, one of them right.

    ``prompt`` is plain text, or messages for the chat template; ``options`` are continuations of
    the text, or assistant messages.
    """

    id: str
    prompt: str | tuple[Message, ...]
    options: tuple[str | Message, ...]
    answer: int
    tools: tuple[Mapping, ...] = ()

    def text(self) -> str:
        """The question as one string: what contamination is checked on."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(m["content"] for m in self.prompt)


@dataclass(frozen=True)
class Question:
    """A :class:`Choice` in tokens; ``sizes`` are the UTF-8 bytes of the options, at least 1."""

    prompt: list[int]
    options: list[list[int]]
    sizes: list[int]
    answer: int


class _Loader(yaml.CSafeLoader):
    """YAML whose custom tags (task code of the harness) load as None."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def draw(
    kind: str, count: int, seed: int, countries: Sequence[factbook.Country] = ()
) -> tuple[Choice, ...]:
    """``count`` questions of the kind of that name in the header; fewer where there are fewer.

    Args:
        countries: see :func:`facts`.

    Raises:
        ValueError: an unknown kind.
    """
    kinds = {
        "mmlu": lambda: mmlu(count),
        "kmmlu": lambda: kmmlu(count),
        "mmlu_translated": lambda: mmlu_translated(count),
        "recall": lambda: recall(count, seed),
        "arithmetic": lambda: arithmetic(count, seed),
        "facts": lambda: facts(count, seed, countries),
    }
    if kind not in kinds:
        raise ValueError(f"unknown kind of question {kind!r}; kinds: {', '.join(kinds)}")
    return kinds[kind]()


def mmlu(limit: int) -> tuple[Choice, ...]:
    """English MMLU exemplars."""
    items = []
    for name, sample in _samples(r"/tasks/mmlu/flan_cot_fewshot/mmlu_\w+\.yaml$"):
        question, *options = re.split(r"\s*\([A-D]\)\s*", sample["question"])
        answer = re.search(r"answer is \(?([A-D])\)?", sample["target"])
        if answer and len(options) == 4:
            items.append(_choice(name, "Question: {}\nAnswer:", question, options, answer[1]))
    return spread(items, limit)


def kmmlu(limit: int) -> tuple[Choice, ...]:
    """Korean KMMLU exemplars."""
    items = []
    for name, sample in _samples(r"/tasks/kmmlu/cot_hard/kmmlu_cot_hard_\w+\.yaml$"):
        answer = re.findall(r"정답은 \(?([A-D])\)?", sample["target"])
        if answer:
            options = [str(sample[letter]) for letter in LETTERS]
            question = str(sample["question"]).removeprefix("질문: ")
            items.append(_choice(name, "질문: {}\n정답:", question, options, answer[-1]))
    return spread(items, limit)


def mmlu_translated(limit: int) -> tuple[Choice, ...]:
    """German and Spanish MMLU exemplars, half each."""
    forms = {"de": "Frage: {}\nAntwort:", "es": "Pregunta: {}\nRespuesta:"}
    items = []
    for name, sample in _samples(r"/llama3/instruct/mmlu_(?:de|es)/mmlu_(?:de|es)_\w+\.yaml$"):
        language = name[5:7]
        options = [str(sample["input_choice_list"][letter]) for letter in LETTERS]
        [answer] = sample["input_correct_responses"]
        items.append(_choice(name, forms[language], sample["input_question"], options, answer))
    half = [[i for i in items if i.id[5:7] == language] for language in forms]
    return tuple(i for h in half for i in spread(h, limit // 2))


def recall(count: int, seed: int) -> tuple[Choice, ...]:
    """The last line of recall documents: which of four stated values follows the key."""
    rng, items = _generator("recall", seed), []
    while len(items) < count:
        [document] = rules.recall(rng, facts=6)
        *lines, asked = document.text.split("\n")
        cue, value = asked.rsplit(" ", 1)
        others = {line.rsplit(" ", 1)[1] for line in lines[:6]} - {value}
        if len(others) == 5:  # all six values differ
            wrong = rng.choice(sorted(others), OPTIONS - 1, replace=False)
            values, answer = _shuffled(rng, value, wrong)
            prompt = "\n".join([*lines, cue])
            items.append(Choice(f"recall/{len(items)}", prompt, values, answer))
    return tuple(items)


def arithmetic(count: int, seed: int, worked: int = 3) -> tuple[Choice, ...]:
    """A sum after ``worked`` others with their results; wrong options are results of other sums."""
    rng, items = _generator("arithmetic", seed), []
    while len(items) < count:
        terms = rng.integers(0, 100, size=(worked + OPTIONS, 2)).tolist()
        sums = [a + b for a, b in terms]
        if len(set(sums[worked:])) == OPTIONS:
            lines = [f"{a} + {b} = {c}" for (a, b), c in zip(terms[:worked], sums, strict=False)]
            a, b = terms[worked]
            options, answer = _shuffled(rng, sums[worked], sums[worked + 1 :])
            prompt = "\n".join([*lines, f"{a} + {b} ="])
            items.append(Choice(f"arithmetic/{len(items)}", prompt, options, answer))
    return tuple(items)


def facts(count: int, seed: int, countries: Sequence[factbook.Country] = ()) -> tuple[Choice, ...]:
    """The capital of a country, in the words of the synthetic facts.

    Args:
        countries: asked about these; none: all of the source.

    Raises:
        SourceError: the World Factbook cannot be fetched.
        ValueError: fewer than four of the countries have a capital.
    """
    rng = _generator("facts", seed)
    capitals = {
        country.name: fact
        for country in countries or factbook.all_countries()
        for fact in country.facts
        if fact.kind == "capital"
    }
    if len(capitals) < OPTIONS:
        raise ValueError(f"{len(capitals)} countries with a capital: questions need {OPTIONS}")
    items = []
    for i in range(count):
        language = LANGUAGES[i % len(LANGUAGES)]
        names = rng.choice(sorted(capitals), OPTIONS, replace=False).tolist()
        right = capitals[names[0]]
        cue, _, end = factbook.render(names[0], [right], language).rpartition(right.name)
        ends = [f"{capitals[name].name}{end}" for name in names]
        options, answer = _shuffled(rng, ends[0], ends[1:])
        items.append(Choice(f"facts/{i}", cue.rstrip(" "), options, answer))
    return tuple(items)


def in_tokens(tokenizer: Tokenizer, item: Choice) -> Question:
    """A choice as a model reads it."""
    pairs = [encode_option(tokenizer, item, option) for option in item.options]
    options = [continuation for _, continuation in pairs]
    texts = (tokenizer.decode(tokens, skip_special_tokens=False) for tokens in options)
    return Question(
        pairs[0][0], options, [max(len(text.encode("utf-8")), 1) for text in texts], item.answer
    )


def encode_option(tokenizer: Tokenizer, item: Choice, option) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of one option; their border is the same for every option."""
    if isinstance(item.prompt, str):
        prompt = encode_plain(tokenizer, item.prompt)
        return prompt, tokenizer.encode(option, add_special_tokens=False).ids
    prompt, _ = encode_chat(
        tokenizer, item.prompt, item.tools, add_generation_prompt=True, enable_thinking=False
    )
    whole, _ = encode_chat(tokenizer, [*item.prompt, option], item.tools)
    if whole[: len(prompt)] != prompt:
        raise ValueError(f"item {item.id!r}: the chat template does not extend its own prompt")
    return prompt, whole[len(prompt) :]


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.token_to_id("[BOS]"), *tokenizer.encode(text, add_special_tokens=False).ids]


def _samples(pattern: str) -> Iterable[tuple[str, dict]]:
    files = sources.files(sources.load_card("lm-eval-exemplars"))
    for name in files:
        if re.search(pattern, name):
            config = yaml.load(files[name], Loader=_Loader)
            stem = name.rsplit("/", 1)[1].removesuffix(".yaml")
            for i, sample in enumerate(config["fewshot_config"]["samples"]):
                yield f"{stem}/{i}", sample


def _choice(name: str, form: str, question: str, options: Sequence[str], letter: str) -> Choice:
    options = tuple(f" {option.strip()}" for option in options)
    return Choice(name, form.format(question.strip()), options, LETTERS.index(letter))


def spread(items: Sequence, limit: int) -> tuple:
    """At most ``limit`` items, evenly spaced over the list, so that every subject has its share."""
    if limit >= len(items):
        return tuple(items)
    return tuple(items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int))


def _generator(kind: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *f"choices/{kind}".encode()])


def _shuffled(
    rng: np.random.Generator, right: Any, wrong: Iterable[Any]
) -> tuple[tuple[str, ...], int]:
    """The options in random order, each after a space, and the place of the right one."""
    options = [right, *wrong]
    order = rng.permutation(len(options)).tolist()
    return tuple(f" {options[i]}" for i in order), order.index(0)
