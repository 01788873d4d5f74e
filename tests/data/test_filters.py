"""Each filter keeps good text and refuses the fault it is named after."""

import pytest

from kexa.data import filters

ENGLISH = (
    "The river rises in the hills to the north of the town and flows for ninety miles to sea. "
    "It is not deep, but it is wide, and the old bridge over it was built by monks of the abbey."
)
KOREAN = (
    "이 법은 국가연구개발사업의 추진 체제를 혁신하고 자율적이고 책임 있는 연구환경을 조성함으로써 "
    "국가혁신역량을 제고하고 국민경제의 발전과 국민의 삶의 질 향상에 이바지함을 목적으로 한다."
)
JAPANESE = (
    "このプログラムは、家族の歴史を記録するためのものです。人物を追加するには、"
    "ツールバーのボタンを押して、名前と生まれた日付を入力してください。保存したあとで、"
    "いつでも変更することができます。家系図は印刷できます。"
)
VIETNAMESE = (
    "Chương trình này giúp bạn ghi lại lịch sử gia đình. Để thêm một người, hãy nhấn nút trên "
    "thanh công cụ rồi nhập tên và ngày sinh. Sau khi lưu, bạn có thể thay đổi các thông tin đó."
)
SPANISH = (
    "El río nace en las colinas al norte de la ciudad y corre durante noventa millas al mar. "
    "No es un río hondo, pero es ancho, y el puente que lo cruza fue obra de monjes de la villa."
)
GERMAN = (
    "Der Fluss entspringt in den Hügeln im Norden der Stadt und fließt neunzig Meilen an das "
    "Meer. Er ist nicht tief, aber die Brücke wird von den Leuten für das Werk des Abts gehalten."
)
TEXTS = {"en": ENGLISH, "ko": KOREAN, "ja": JAPANESE, "vi": VIETNAMESE, "es": SPANISH, "de": GERMAN}


@pytest.mark.parametrize("category", TEXTS)
def test_text_in_its_own_language_is_kept(category):
    assert filters.reject(TEXTS[category], category) is None


@pytest.mark.parametrize("category", TEXTS)
@pytest.mark.parametrize("other", TEXTS)
def test_text_in_another_language_is_refused(category, other):
    if category != other:
        assert not filters.has_language(TEXTS[other], category)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short.", "has_length"),
        (ENGLISH * 400, "has_length"),
        (ENGLISH + "\ufffd", "is_text"),
        (ENGLISH + "\x00", "is_text"),
        ("\n".join(["The same line of the text again"] * 9), "has_variety"),
        ("lorem ipsum dolor sit amet " * 10, "has_language"),
    ],
)
def test_the_reason_is_named(text, reason):
    assert filters.reject(text, "en") == reason


def test_code_passes_whatever_its_words():
    assert (
        filters.reject(
            "def f(x):\n    return x + 1\n" + "# comment about f\n" * 3 + "x = 1\n" * 20, "code"
        )
        is None
    )


def test_normalize_composes_and_cleans():
    assert filters.normalize("e\u0301 \r\nb\t\n\n") == "\u00e9\nb"
    assert filters.normalize("x\u00b2") == "x\u00b2", "NFC keeps superscripts, NFKC would not"
