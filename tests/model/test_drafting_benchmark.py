"""The drafting benchmark: its checks fail where they should, and then it tells no speed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import drafting
from kexa.data import TokenizedDocuments


@pytest.fixture
def texts(ids):
    def text(lengths):
        return TokenizedDocuments(
            np.concatenate([ids(1, n)[0].numpy().astype(np.int32) for n in lengths]),
            np.concatenate(([0], np.cumsum(lengths))),
        )

    return {"en": text([12, 4, 10]), "ko": text([30, 10])}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(drafting, "BATCH_SIZES", (1, 2))
    monkeypatch.setattr(drafting, "TEMPERATURES", (0.0, 1.0))


def test_prompts_straddle_the_window_in_every_domain(texts):
    prompts = drafting.cut_prompts(texts, 5, 25)
    assert [len(p.ids) for p in prompts] == ([*range(1, 11)] * 3)[:25]
    assert [p.domain for p in prompts[:3]] == ["en", "ko", "en"]
    assert prompts[0].ids == texts["en"].tokens[:1].tolist()
    assert (
        prompts[2].ids == texts["en"].tokens[16:19].tolist()
    )  # a document of 4 tokens is left out
    with pytest.raises(ValueError, match="en has 16 tokens"):
        drafting.cut_prompts(texts, 8, 25)


def test_all_parts_run(build, texts):
    found = drafting.results(build(), texts, count=12, new_tokens=8, draws=2000, rounds=2)
    assert found["identity"]["equal"] == found["identity"]["prompts"] == 12
    assert found["checks_hold"] and found["chi_square"]["p"] >= 0.001
    assert [row["temperature"] for row in found["acceptance"]] == [0.0, 1.0]
    for row in found["acceptance"]:
        assert set(row["domain"]) == {"en", "ko"} and len(row["position"]) == 6
        for share, low, high in (row["all"], *row["domain"].values(), *row["position"].values()):
            assert 0 <= low <= share <= high <= 1
    assert [(r["batch"], r["temperature"]) for r in found["speed"]] == [
        (1, 0.0), (2, 0.0), (1, 1.0), (2, 1.0),
    ]  # fmt: skip
    assert drafting.table(found).count("\n") == 2 + 4


def test_a_changed_token_is_found_and_stops_the_speed(build, texts, monkeypatch):
    real = drafting.sample

    def wrong(*arguments, self_draft):
        found = real(*arguments, self_draft=self_draft)
        if self_draft and len(found) == 3:
            found[1].tokens[3] += 1
        return found

    monkeypatch.setattr(drafting, "sample", wrong)
    found = drafting.results(build(), texts, count=12, new_tokens=8, draws=1000)
    assert found["identity"]["equal"] == 11
    assert found["identity"]["first_different"] == [{"prompt_tokens": 5, "rows": 3, "at": 3}]
    assert not found["checks_hold"] and found["speed"] == []


def test_another_distribution_fails_the_chi_square_test(build, monkeypatch):
    model, real = build(), drafting.sample_with_stats
    assert drafting.chi_square(model, [5, 9, 2], 4000)["p"] > 0.001
    monkeypatch.setattr(
        drafting,
        "sample_with_stats",
        lambda model, ids, n, t, **rest: real(model, ids, n, 0.8 * t, **rest),
    )
    assert drafting.chi_square(model, [5, 9, 2], 4000)["p"] < 0.001


@pytest.mark.parametrize(
    ("statistic", "degrees", "p"), [(18.307, 10, 0.05), (99.607, 60, 0.001), (59.335, 60, 0.5)]
)
def test_upper_tail_of_chi_square(statistic, degrees, p):
    assert drafting.upper_tail(statistic, degrees) == pytest.approx(p, abs=1e-3)
