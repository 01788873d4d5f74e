"""Verifiable tasks: endless prompts of two families in six languages, with check and oracle.

    math          small sums and differences; the answer stands in \\boxed{}
    instruction   verifiable constraints: list so many things in this layout, repeat a word so often,
                  count from one number to another

A task carries a worked reasoning and answer, which is what supervised fine-tuning imitates before
reinforcement learning replaces imitation by the check. Tasks fall on the training or the held-out
side by a hash of what they ask (for a sum the expression, in whatever language), so the sides never
share a question, whatever seed drew it.

reported: a multi-task mix of verifiable domains (mathematics and instruction following are two of
the four), languages en, ko, es, de, ja, vi.
chosen: the tasks themselves, of a size that a model of a million parameters gets partly right. What
a task is about stands at the end of its prompt, so that a window layer sees it from the reply.
chosen: questions are combinations (numbers and signs; count, kind and layout; first and last
number). What is held out is a combination whose parts are all trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kexa.post.rewards import BoxedInteger, Check, CountedUp, Layout, ListOf, RepeatedWord

Side = Literal["train", "heldout"]
HELDOUT_SHARE = 0.2
FAMILIES = ("math", "instruction")
LANGUAGES = ("en", "ko", "es", "de", "ja", "vi")

_SUM = {
    "en": "Compute and answer in \\boxed{{}}: {sum}",
    "ko": "계산하고 답을 \\boxed{{}} 안에 쓰세요: {sum}",
    "es": "Calcula y responde en \\boxed{{}}: {sum}",
    "de": "Berechne und antworte in \\boxed{{}}: {sum}",
    "ja": "計算し、答えを\\boxed{{}}に書いてください: {sum}",
    "vi": "Tính và trả lời trong \\boxed{{}}: {sum}",
}
_REPEAT = {
    "en": "Write this word exactly {count} times: {word}",
    "ko": "다음 단어를 정확히 {count}번 쓰세요: {word}",
    "es": "Escribe esta palabra exactamente {count} veces: {word}",
    "de": "Schreibe dieses Wort genau {count} Mal: {word}",
    "ja": "次の単語をちょうど{count}回書いてください: {word}",
    "vi": "Viết từ này đúng {count} lần: {word}",
}
_LIST: dict[str, dict[Layout, str]] = {
    "en": {
        "commas": "Write a list with commas: exactly {count} {kind}",
        "lines": "Write a list, one entry per line: exactly {count} {kind}",
    },
    "ko": {
        "commas": "쉼표로 구분해 정확히 쓰세요: {kind} {count}개",
        "lines": "한 줄에 하나씩 정확히 쓰세요: {kind} {count}개",
    },
    "es": {
        "commas": "Escribe una lista con comas: exactamente {count} {kind}",
        "lines": "Escribe una lista, una entrada por línea: exactamente {count} {kind}",
    },
    "de": {
        "commas": "Schreibe eine Liste mit Kommas: genau {count} {kind}",
        "lines": "Schreibe eine Liste, ein Eintrag je Zeile: genau {count} {kind}",
    },
    "ja": {
        "commas": "読点で区切って書いてください: {kind}をちょうど{count}個",
        "lines": "一行に一つずつ書いてください: {kind}をちょうど{count}個",
    },
    "vi": {
        "commas": "Viết danh sách có dấu phẩy: đúng {count} {kind}",
        "lines": "Viết danh sách, mỗi dòng một mục: đúng {count} {kind}",
    },
}
_COUNT = {
    "en": "Count, with commas, from {first} to {last}",
    "ko": "쉼표로 구분해 세어 보세요: {first}부터 {last}까지",
    "es": "Cuenta, con comas, de {first} a {last}",
    "de": "Zähle mit Kommas von {first} bis {last}",
    "ja": "読点で区切って数えてください: {first}から{last}まで",
    "vi": "Đếm, có dấu phẩy, từ {first} đến {last}",
}
# What can be listed and repeated, by language and kind.
_THINGS = {
    "en": {
        "animals": "dog cat horse cow bird fish bear wolf",
        "colours": "red blue green black white yellow brown grey",
        "foods": "bread rice milk egg apple soup cheese salt",
    },
    "ko": {
        "동물": "개 고양이 말 소 새 물고기 곰 늑대",
        "색": "빨강 파랑 초록 검정 하양 노랑 갈색 회색",
        "음식": "빵 밥 우유 달걀 사과 국 치즈 소금",
    },
    "es": {
        "animales": "perro gato caballo vaca pájaro pez oso lobo",
        "colores": "rojo azul verde negro blanco amarillo marrón gris",
        "alimentos": "pan arroz leche huevo manzana sopa queso sal",
    },
    "de": {
        "Tiere": "Hund Katze Pferd Kuh Vogel Fisch Bär Wolf",
        "Farben": "Rot Blau Grün Schwarz Weiß Gelb Braun Grau",
        "Speisen": "Brot Reis Milch Ei Apfel Suppe Käse Salz",
    },
    "ja": {
        "動物": "犬 猫 馬 牛 鳥 魚 熊 狼",
        "色": "赤 青 緑 黒 白 黄色 茶色 灰色",
        "食べ物": "パン 米 牛乳 卵 りんご スープ チーズ 塩",
    },
    "vi": {
        "con vật": "chó mèo ngựa bò chim cá gấu sói",
        "màu": "đỏ xanh lục đen trắng vàng nâu xám",
        "món ăn": "bánh cơm sữa trứng táo canh thịt muối",
    },
}


@dataclass(frozen=True)
class Task:
    """One prompt with the check of its answer and a worked solution that passes it."""

    family: str
    language: str
    question: str  # what is asked, apart from wording: decides the side
    prompt: str
    check: Check
    reasoning: str
    answer: str

    @property
    def side(self) -> Side:
        """Train or held out, by the question alone."""
        digest = hashlib.sha256(self.question.encode("utf-8")).digest()
        return "heldout" if digest[0] < 256 * HELDOUT_SHARE else "train"

    def messages(self, thinking: bool) -> list[dict[str, str]]:
        """Prompt and worked answer as a conversation, with or without the reasoning."""
        reply = {"role": "assistant", "content": self.answer}
        if thinking:
            reply["reasoning_content"] = self.reasoning
        return [{"role": "user", "content": self.prompt}, reply]


def generate(
    family: str, side: Side, count: int, seed: int, max_terms: int = 3, max_number: int = 9
) -> list[Task]:
    """Draw ``count`` tasks; repeats are possible, as in any random draw.

    Args:
        family: one of :data:`FAMILIES`.
        side: which side of the split the questions come from. max_terms, max_number: size of the
        sums: 2 to ``max_terms`` numbers from 1 to ``max_number``.

    Raises:
        ValueError: an unknown family.
    """
    if family not in _DRAW:
        raise ValueError(f"no task family {family!r}; use one of {', '.join(FAMILIES)}")
    rng = random.Random(f"{family} {side} {seed}")
    tasks: list[Task] = []
    while len(tasks) < count:
        task = _DRAW[family](rng, rng.choice(LANGUAGES), max_terms, max_number)
        if task.side == side:
            tasks.append(task)
    return tasks


def distinct(tasks: list[Task]) -> list[Task]:
    """The tasks without repeated prompts, in order."""
    return list({task.prompt: task for task in tasks}.values())


def _draw_sum(rng: random.Random, language: str, max_terms: int, max_number: int) -> Task:
    total = rng.randint(1, max_number)
    text, steps = str(total), []
    for _ in range(rng.randint(2, max_terms) - 1):
        sign, number = rng.choice("+-"), rng.randint(1, max_number)
        result = total + number if sign == "+" else total - number
        steps.append(f"{total}{sign}{number}={result}")
        text, total = f"{text}{sign}{number}", result
    prompt = _SUM[language].format(sum=text)
    answer = f"\\boxed{{{total}}}"
    return Task("math", language, text, prompt, BoxedInteger(total), "\n".join(steps), answer)


def _draw_instruction(rng: random.Random, language: str, max_terms: int, max_number: int) -> Task:
    return rng.choice((_draw_list, _draw_repeat, _draw_count))(rng, language)


def _draw_list(rng: random.Random, language: str) -> Task:
    kind, count = rng.choice(list(_THINGS[language])), rng.randint(2, 4)
    layout: Layout = rng.choice(("commas", "lines"))
    prompt = _LIST[language][layout].format(kind=kind, count=count)
    separator = _comma(language) if layout == "commas" else "\n"
    answer = separator.join(rng.sample(_THINGS[language][kind].split(), count))
    plan = f"{count} {kind}, {layout}"
    return _instruction(language, plan, prompt, ListOf(count, layout), answer)


def _draw_repeat(rng: random.Random, language: str) -> Task:
    words = " ".join(_THINGS[language].values()).split()
    word, times = rng.choice(words), rng.randint(2, 3)
    prompt = _REPEAT[language].format(word=word, count=times)
    answer = " ".join([word] * times)
    return _instruction(language, f"{times} x {word}", prompt, RepeatedWord(word, times), answer)


def _draw_count(rng: random.Random, language: str) -> Task:
    first = rng.randint(1, 12)
    last = first + rng.randint(2, 5)
    prompt = _COUNT[language].format(first=first, last=last)
    answer = _comma(language).join(map(str, range(first, last + 1)))
    return _instruction(language, f"{first} .. {last}", prompt, CountedUp(first, last), answer)


def _instruction(language: str, plan: str, prompt: str, check: Check, answer: str) -> Task:
    """An instruction task; its plan in a few symbols is both the question and the reasoning."""
    return Task("instruction", language, plan, prompt, check, plan, answer)


def _comma(language: str) -> str:
    return "、" if language == "ja" else ", "


_DRAW: dict[str, Callable[[random.Random, str, int, int], Task]] = {
    "math": _draw_sum,
    "instruction": _draw_instruction,
}
