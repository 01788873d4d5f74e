"""Verifiable tasks: endless prompts of two families in six languages, with check and oracle.

    math          sums and differences of several small numbers; the answer stands in \\boxed{}
    instruction   verifiable constraints: list so many things in this layout, write a number so
                  often, count from one number to another

A task carries a worked reasoning and answer, which is what supervised fine-tuning imitates before
reinforcement learning replaces imitation by the check. A hash of what a task asks (for a sum the
expression, in whatever language) puts it on one of three sides: imitated by fine-tuning, practised
on in reinforcement and preference learning, or held out. The sides never share a question, whatever
seed drew it.

reported: a multi-task mix of verifiable domains (mathematics and instruction following are two of
the four), languages en, ko, es, de, ja, vi.
chosen: the tasks themselves, of a size that a model of a million parameters gets partly right. What
a task is about stands at the end of its prompt, so that a window layer sees it from the reply.
chosen: three sides. On questions that it has imitated a small policy learns to recall; on others it
makes the errors that it would make on new ones, and those are what a reward can mend.
chosen: questions are combinations (two steps and more of a sum; count, kind and layout; first and
last number). What is held out is a combination whose parts are all trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from kexa.post.rewards import (
    AtMostCharacters,
    BoxedInteger,
    Check,
    CountedUp,
    EndsInQuestion,
    Layout,
    ListOf,
    NoCommas,
    RepeatedWord,
)

Side = Literal["sft", "rl", "heldout"]
HELDOUT_SHARE, RL_SHARE = 0.2, 0.4  # the rest is imitated
PATIENCE = 10_000  # draws without a new prompt after which there are no more
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
    "en": "Write this number exactly {times} times: {number}",
    "ko": "다음 수를 정확히 {times}번 쓰세요: {number}",
    "es": "Escribe este número exactamente {times} veces: {number}",
    "de": "Schreibe diese Zahl genau {times} Mal: {number}",
    "ja": "次の数をちょうど{times}回書いてください: {number}",
    "vi": "Viết số này đúng {times} lần: {number}",
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
_CONSTRAINTS = {
    "short": {
        "en": "Answer in at most {count} characters.",
        "ko": "{count}자 이내로 답하세요.",
        "es": "Responde en {count} caracteres como máximo.",
        "de": "Antworte in höchstens {count} Zeichen.",
        "ja": "{count}文字以内で答えてください。",
        "vi": "Trả lời không quá {count} ký tự.",
    },
    "no commas": {
        "en": "Answer without commas.",
        "ko": "쉼표 없이 답하세요.",
        "es": "Responde sin comas.",
        "de": "Antworte ohne Kommas.",
        "ja": "読点を使わずに答えてください。",
        "vi": "Trả lời không dùng dấu phẩy.",
    },
    "question": {
        "en": "End with a question mark.",
        "ko": "물음표로 끝내세요.",
        "es": "Termina con un signo de interrogación.",
        "de": "Ende mit einem Fragezeichen.",
        "ja": "疑問符で終えてください。",
        "vi": "Kết thúc bằng dấu hỏi.",
    },
}
# What can be listed, by language and kind; the kinds are the same in every language.
_THINGS = {
    "en": {
        "animals": "dog cat horse cow bird fish bear wolf",
        "colours": "red blue green black white yellow brown grey",
        "foods": "bread rice milk egg apple soup cheese salt",
        "clothes": "hat coat shirt shoe sock scarf glove belt",
        "cities": "London Paris Berlin Madrid Rome Vienna Oslo Dublin",
    },
    "ko": {
        "동물": "개 고양이 말 소 새 물고기 곰 늑대",
        "색": "빨강 파랑 초록 검정 하양 노랑 갈색 회색",
        "음식": "빵 밥 우유 달걀 사과 국 치즈 소금",
        "옷": "모자 외투 셔츠 신발 양말 목도리 장갑 바지",
        "도시": "서울 부산 대구 인천 광주 대전 울산 수원",
    },
    "es": {
        "animales": "perro gato caballo vaca pájaro pez oso lobo",
        "colores": "rojo azul verde negro blanco amarillo marrón gris",
        "alimentos": "pan arroz leche huevo manzana sopa queso sal",
        "prendas": "gorro abrigo camisa zapato calcetín bufanda guante cinturón",
        "ciudades": "Madrid Sevilla Lima Quito Bogotá Toledo Cádiz León",
    },
    "de": {
        "Tiere": "Hund Katze Pferd Kuh Vogel Fisch Bär Wolf",
        "Farben": "Rot Blau Grün Schwarz Weiß Gelb Braun Grau",
        "Speisen": "Brot Reis Milch Ei Apfel Suppe Käse Salz",
        "Kleidungsstücke": "Hut Mantel Hemd Schuh Socke Schal Handschuh Gürtel",
        "Städte": "Berlin Hamburg Köln Bremen Leipzig Dresden Bonn Essen",
    },
    "ja": {
        "動物": "犬 猫 馬 牛 鳥 魚 熊 狼",
        "色": "赤 青 緑 黒 白 黄色 茶色 灰色",
        "食べ物": "パン 米 牛乳 卵 りんご スープ チーズ 塩",
        "服": "帽子 コート シャツ 靴 靴下 マフラー 手袋 ズボン",
        "都市": "東京 大阪 京都 奈良 神戸 札幌 仙台 福岡",
    },
    "vi": {
        "con vật": "chó mèo ngựa bò chim cá gấu sói",
        "màu": "đỏ xanh lục đen trắng vàng nâu xám",
        "món ăn": "bánh cơm sữa trứng táo canh thịt muối",
        "quần áo": "mũ áo giày tất khăn váy quần găng",
        "thành phố": "Huế Vinh Paris London Seoul Tokyo Oslo Roma",
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
        """Imitated, practised on or held out, by the question alone."""
        place = hashlib.sha256(self.question.encode("utf-8")).digest()[0] / 256
        if place < HELDOUT_SHARE:
            return "heldout"
        return "rl" if place < HELDOUT_SHARE + RL_SHARE else "sft"

    def messages(self, thinking: bool) -> list[dict[str, str]]:
        """Prompt and worked answer as a conversation, with or without the reasoning."""
        reply = {"role": "assistant", "content": self.answer}
        if thinking:
            reply["reasoning_content"] = self.reasoning
        return [{"role": "user", "content": self.prompt}, reply]


def generate(
    family: str, side: Side, count: int, seed: int, max_terms: int = 4, max_number: int = 9
) -> list[Task]:
    """Draw ``count`` tasks; repeats are possible, as in any random draw.

    Args:
        family: one of :data:`FAMILIES`.
        side: which side of the split the questions come from.
        max_terms, max_number: size of the sums: 3 to ``max_terms`` numbers from 1 to
            ``max_number``.

    Raises:
        ValueError: an unknown family.
    """
    return list(islice(_stream(family, side, seed, max_terms, max_number), count))


def distinct(
    family: str, side: Side, count: int, seed: int, max_terms: int = 4, max_number: int = 9
) -> list[Task]:
    """The first ``count`` tasks with different prompts that :func:`generate` would draw.

    Raises:
        ValueError: an unknown family, or fewer different prompts than asked for.
    """
    found: dict[str, Task] = {}
    idle = 0
    for task in _stream(family, side, seed, max_terms, max_number):
        if len(found) == count or idle == PATIENCE:
            break
        idle = idle + 1 if task.prompt in found else 0
        found.setdefault(task.prompt, task)
    if len(found) < count:
        raise ValueError(
            f"{count} different {side} prompts of family {family!r} asked for, {len(found)} found; "
            "ask for fewer, or raise max_terms and max_number"
        )
    return list(found.values())


def constrain(opening: str, language: str, rng: random.Random) -> tuple[str, Check]:
    """The opening of a conversation with one constraint on the reply added, and its check.

    For preference learning, where a rule and a rubric score the same reply. ``language``: one of
    :data:`LANGUAGES`.
    """
    kind = rng.choice(list(_CONSTRAINTS))
    count = rng.choice((20, 30, 40))
    checks: dict[str, Check] = {
        "short": AtMostCharacters(count),
        "no commas": NoCommas(),
        "question": EndsInQuestion(),
    }
    request = _CONSTRAINTS[kind][language].format(count=count)
    return f"{opening} {request}", checks[kind]


def _stream(family: str, side: Side, seed: int, max_terms: int, max_number: int) -> Iterator[Task]:
    if family not in _DRAW:
        raise ValueError(f"no task family {family!r}; use one of {', '.join(FAMILIES)}")
    rng = random.Random(f"{family} {side} {seed}")
    while True:
        task = _DRAW[family](rng, rng.choice(LANGUAGES), max_terms, max_number)
        if task.side == side:
            yield task


def _draw_sum(rng: random.Random, language: str, max_terms: int, max_number: int) -> Task:
    total = rng.randint(1, max_number)
    text, steps = str(total), []
    for _ in range(rng.randint(3, max_terms) - 1):
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
    things = rng.randrange(len(_THINGS[language]))
    kind, count = list(_THINGS[language])[things], rng.randint(2, 5)
    layout: Layout = rng.choice(("commas", "lines"))
    prompt = _LIST[language][layout].format(kind=kind, count=count)
    separator = _comma(language) if layout == "commas" else "\n"
    answer = separator.join(rng.sample(_THINGS[language][kind].split(), count))
    question, plan = f"{count} of kind {things}, {layout}", f"{count} {kind}, {layout}"
    return Task("instruction", language, question, prompt, ListOf(count, layout), plan, answer)


def _draw_repeat(rng: random.Random, language: str) -> Task:
    number, times = rng.randint(1, 99), rng.randint(2, 5)
    prompt = _REPEAT[language].format(number=number, times=times)
    answer = " ".join([str(number)] * times)
    check = RepeatedWord(str(number), times)
    plan = f"{times} x {number}"
    return Task("instruction", language, plan, prompt, check, plan, answer)


def _draw_count(rng: random.Random, language: str) -> Task:
    first = rng.randint(1, 60)
    last = first + rng.randint(2, 5)
    prompt = _COUNT[language].format(first=first, last=last)
    answer = _comma(language).join(map(str, range(first, last + 1)))
    plan = f"{first} .. {last}"
    return Task("instruction", language, plan, prompt, CountedUp(first, last), plan, answer)


def _comma(language: str) -> str:
    return "、" if language == "ja" else ", "


_DRAW: dict[str, Callable[[random.Random, str, int, int], Task]] = {
    "math": _draw_sum,
    "instruction": _draw_instruction,
}
