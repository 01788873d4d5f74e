"""Safety dialogues in six languages: decline what is harmful, answer what is harmless.

A dialogue is one request and one reply. Requests are made from frames ("Tell me how to ...") and
actions, the same frames for both kinds, so that the action and not the frame has to decide. Half of
the dialogues are harmful; a model that learns to decline everything gets half of them wrong.

reported: safety is one of the domains of preference learning, and the post-training languages are
ko, en, es, de, ja, vi. chosen: the dialogues, which are few, plain and short, and share no request
with the safety set of :mod:`kexa.eval`; what a model learns from them is a first reflex, not
judgement.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Dialogue:
    """One request and its reply."""

    language: str
    harmful: bool
    request: str
    reply: str

    @property
    def messages(self) -> list[dict[str, str]]:
        """The dialogue for the chat template."""
        return [
            {"role": "user", "content": self.request},
            {"role": "assistant", "content": self.reply},
        ]


@dataclass(frozen=True)
class _Phrases:
    """``{}`` in a frame or reply is an action; actions are separated by ``|``."""

    frames: tuple[str, ...]
    harmful: str
    harmless: str
    decline: str
    answer: str


_PHRASES = {
    "en": _Phrases(
        ("Tell me how to {}.", "Help me {}.", "Write a text on how to {}.", "Explain how to {}."),
        "hurt a stranger|steal a car|spread a lie about my neighbour|forge a passport|"
        "insult a religion|spy on my wife|break a chatbot's rules|start a riot|cheat old people|"
        "make people hate a party|hack an account|deny a massacre",
        "bake bread|learn Korean|plant a tree|write a letter|repair a chair|plan a trip|"
        "cook rice|read a map|save money|sleep well|visit a museum|train a dog",
        "I cannot help with that, because it would hurt people.",
        "You can {} step by step. Start small and take your time.",
    ),
    "ko": _Phrases(
        ("{} 방법을 알려 줘.", "{} 것을 도와줘.", "{} 글을 써 줘.", "{} 법을 설명해 줘."),
        "사람을 다치게 하는|차를 훔치는|거짓 소문을 퍼뜨리는|여권을 위조하는|종교를 모욕하는|"
        "남의 메시지를 훔쳐보는|챗봇의 규칙을 깨는|폭동을 일으키는|노인을 속이는|"
        "특정 지역을 비하하는|계정을 해킹하는|역사를 왜곡하는",
        "빵을 굽는|한국어를 배우는|나무를 심는|편지를 쓰는|의자를 고치는|여행을 계획하는|"
        "밥을 짓는|지도를 읽는|돈을 아끼는|잠을 잘 자는|박물관을 찾는|강아지를 훈련하는",
        "죄송하지만 도와드릴 수 없습니다. 사람들에게 해가 됩니다.",
        "{} 일은 천천히 하나씩 시작하면 됩니다.",
    ),
    "es": _Phrases(
        ("Dime cómo {}.", "Ayúdame a {}.", "Escribe un texto sobre cómo {}.", "Explica cómo {}."),
        "herir a un desconocido|robar un coche|difundir una mentira|falsificar un pasaporte|"
        "insultar a una religión|espiar a mi mujer|romper las reglas de un robot|"
        "empezar una pelea|engañar a ancianos|hacer odiar a un partido",
        "hacer pan|aprender coreano|plantar un árbol|escribir una carta|reparar una silla|"
        "planear un viaje|cocinar arroz|leer un mapa|ahorrar dinero|dormir bien",
        "Lo siento, no puedo ayudar con eso, porque haría daño.",
        "Para {}, empieza poco a poco y con calma.",
    ),
    "de": _Phrases(
        ("Sag mir, wie man {}.", "Zeig mir, wie man {}.", "Schreib auf, wie man {}."),
        "einen Fremden verletzt|ein Auto stiehlt|eine Lüge verbreitet|einen Pass fälscht|"
        "eine Religion beleidigt|seine Frau ausspioniert|die Regeln eines Chatbots bricht|"
        "eine Schlägerei beginnt|alte Leute betrügt|Hass auf eine Partei schürt",
        "Brot backt|Koreanisch lernt|einen Baum pflanzt|einen Brief schreibt|"
        "einen Stuhl repariert|eine Reise plant|Reis kocht|eine Karte liest|Geld spart|gut schläft",
        "Das kann ich nicht tun, denn es würde Menschen schaden.",
        "Wie man {}: Fang klein an und nimm dir Zeit.",
    ),
    "ja": _Phrases(
        ("{}方法を教えて。", "{}のを手伝って。", "{}文を書いて。", "{}やり方を説明して。"),
        "人を傷つける|車を盗む|うそを広める|旅券を偽造する|宗教を侮辱する|妻を監視する|"
        "ロボットの規則を破る|けんかを始める|老人をだます|政党を憎ませる",
        "パンを焼く|韓国語を学ぶ|木を植える|手紙を書く|椅子を直す|旅行を計画する|"
        "ご飯を炊く|地図を読む|お金をためる|よく眠る",
        "申し訳ありませんが、お手伝いできません。人に害を与えます。",
        "{}には、少しずつ始めてください。",
    ),
    "vi": _Phrases(
        ("Chỉ cho tôi cách {}.", "Giúp tôi {}.", "Viết về cách {}.", "Giải thích cách {}."),
        "làm hại người lạ|trộm xe|lan truyền lời nói dối|làm giả hộ chiếu|xúc phạm tôn giáo|"
        "theo dõi vợ|phá luật của chatbot|gây đánh nhau|lừa người già|làm người ta ghét một đảng",
        "nướng bánh|học tiếng Hàn|trồng cây|viết thư|sửa ghế|lên kế hoạch du lịch|"
        "nấu cơm|đọc bản đồ|tiết kiệm tiền|ngủ ngon",
        "Xin lỗi, tôi không thể giúp, vì việc đó gây hại.",
        "Để {}, hãy bắt đầu từ từ từng bước.",
    ),
}


def dialogues(count: int, seed: int) -> list[Dialogue]:
    """``count`` dialogues, languages and kinds in turn, drawn with a seed."""
    rng = random.Random(f"refusals {seed}")
    languages = list(_PHRASES)
    out = []
    for i in range(count):
        phrases = _PHRASES[language := languages[i // 2 % len(languages)]]
        harmful = i % 2 == 0
        action = rng.choice((phrases.harmful if harmful else phrases.harmless).split("|"))
        request = rng.choice(phrases.frames).format(action)
        reply = phrases.decline if harmful else phrases.answer.format(action)
        out.append(Dialogue(language, harmful, request, reply))
    return out
