"""Addresses and telephone numbers go, numbers that only look like them stay."""

import time

import pytest

from kexa.data.personal import mask_personal
from kexa.tokenizer.vocabulary import SPECIAL_TOKENS


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+x@mail.example.org, please.", "Write to PI:EMAIL, please."),
        ("<a.b@c.de>", "<PI:EMAIL>"),
        ("문의는 abc@korea.kr 로", "문의는 PI:EMAIL 로"),
        ("Call +82 10-1234-5678 now", "Call PI:PHONE_NUM now"),
        ("+821012345678.", "PI:PHONE_NUM."),
        ("+1 (202) 298-5700", "PI:PHONE_NUM"),
        ("+49 30 1234 5678", "PI:PHONE_NUM"),
        ("휴대전화 010-123-4567, 02-1234-5678", "휴대전화 PI:PHONE_NUM, PI:PHONE_NUM"),
        ("電話 03-1234-5678。", "電話 PI:PHONE_NUM。"),
        ("FAX: (212) 422-3427", "FAX: PI:PHONE_NUM"),
    ],
)
def test_personal_information_becomes_its_special_token(text, masked):
    assert mask_personal(text, "ko") == masked


@pytest.mark.parametrize(
    "text",
    [
        "2024-11-24 12:30, pages 100-120, ISBN 978-89-349-0000-1",
        "x = +3.140000 and +000000120 and +922337203685477.5807",
        "version 1.2.3-4567, 10.0.0.1, #123-4567",
        "@decorator, user@localhost, a @ b",
    ],
)
def test_numbers_and_names_that_are_neither_stay(text):
    assert mask_personal(text, "en") == text


def test_code_keeps_its_digits_and_loses_its_addresses():
    code = "# Author: A <a@b.org>\nRANGE = '010-123-4567'\n"
    assert mask_personal(code, "code") == "# Author: A <PI:EMAIL>\nRANGE = '010-123-4567'\n"


def test_the_replacements_are_special_tokens_of_the_vocabulary():
    assert {"PI:EMAIL", "PI:PHONE_NUM"} <= set(SPECIAL_TOKENS)


@pytest.mark.parametrize("piece", ["a", "a.", "a@", "+1 ", "1-", "a@a."])
def test_long_runs_take_linear_time(piece):
    start = time.perf_counter()
    mask_personal(piece * (200_000 // len(piece)), "en")
    assert time.perf_counter() - start < 5
