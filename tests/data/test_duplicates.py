"""Planted near-duplicates are found, distinct texts are not; the sketch agrees with brute force."""

import itertools
import random

import numpy as np
import pytest

from kexa.data.duplicates import (
    BANDS,
    ROWS,
    SIMILARITY,
    NearDuplicates,
    groups,
    shingles,
    signature,
    similarity,
)

TEXTS = 300
ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyz",
    "hangul": "가나다라마바사아자차카타파하",
    "kana": "",  # one character is one word there
}


def vocabulary(script: str, rng: random.Random) -> list[str]:
    if script == "kana":
        return [chr(c) for c in range(0x3041, 0x3097)] + [chr(c) for c in range(0x4E00, 0x4F00)]
    return ["".join(rng.choices(ALPHABETS[script], k=rng.randint(2, 9))) for _ in range(3000)]


def planted(script: str, share: float) -> tuple[list[str], list[str]]:
    """Random texts of 20 to 400 words, and a copy of each with a share of its words changed."""
    rng = random.Random(f"{script} {share}")
    known = vocabulary(script, rng)
    weights = [1 / (i + 1) for i in range(len(known))]  # some words are common, as in language
    originals, copies = [], []
    for _ in range(TEXTS):
        text = rng.choices(known, weights, k=rng.randint(20, 400))
        copy = list(text)
        for i in rng.sample(range(len(text)), round(share * len(text))):
            copy[i] = rng.choice([w for w in rng.sample(known, 3) if w != text[i]])
        separator = "" if script == "kana" else " "
        originals.append(separator.join(text))
        copies.append(separator.join(copy))
    return originals, copies


@pytest.mark.parametrize("script", ALPHABETS)
def test_planted_near_duplicates_are_found_and_distinct_texts_are_not(script):
    originals, copies = planted(script, 0.05)
    seen = NearDuplicates()
    pairs = 0
    for text in originals:
        pairs += len(seen.matches(shingles(text)))
        seen.add(shingles(text))
    assert pairs < 0.001 * TEXTS * (TEXTS - 1) / 2
    found = [seen.matches(shingles(copy)) for copy in copies]
    assert sum(i in matches for i, matches in enumerate(found)) >= 0.99 * TEXTS
    assert sum(len(set(m) - {i}) for i, m in enumerate(found)) < 0.001 * TEXTS * (TEXTS - 1)


def test_half_shared_text_is_no_near_duplicate():
    originals, _ = planted("latin", 0.0)
    seen = NearDuplicates()
    for text in originals:
        seen.add(shingles(text))
    mixed = []
    for a, b in itertools.pairwise(originals):
        first, second = a.split(), b.split()
        size = min(len(first), len(second))
        mixed.append(" ".join(first[: size // 2] + second[size // 2 : size]))
    assert not any(seen.matches(shingles(text)) for text in mixed)


def test_matches_are_those_of_brute_force():
    texts = [t for pair in zip(*planted("latin", 0.08), strict=True) for t in pair][:120]
    sets = [set(shingles(t).tolist()) for t in texts]
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= SIMILARITY
    }
    seen = NearDuplicates()
    found = set()
    for j, text in enumerate(texts):
        found |= {(i, j) for i in seen.matches(shingles(text))}
        seen.add(shingles(text))
    assert found <= expected, "a verdict is exact"
    assert len(found) >= 0.98 * len(expected) > 20


def test_similarity_by_hand_and_its_estimate():
    a, b = shingles("a b c d e"), shingles("a b c d f")  # abc bcd cde, abc bcd cdf
    assert similarity(a, b) == 2 / 4
    assert similarity(a, a) == 1
    long_a = shingles(" ".join(f"w{i}" for i in range(2000)))
    long_b = shingles(" ".join(f"w{i}" for i in range(1000, 3000)))
    agreement = np.mean(signature(long_a) == signature(long_b))
    assert similarity(long_a, long_b) == pytest.approx(1 / 3, abs=0.001)
    assert agreement == pytest.approx(1 / 3, abs=4 * (2 / 9 / (BANDS * ROWS)) ** 0.5)


@pytest.mark.parametrize("text", ["", "one", "one two", "\ud800"])
def test_short_and_broken_texts_have_one_shingle(text):
    assert len(shingles(text)) == 1
    assert len(signature(shingles(text))) == BANDS * ROWS


def test_spacing_and_case_make_no_difference():
    assert (shingles("The old  Bridge\nfell.") == shingles("the OLD bridge, fell")).all()


def test_groups_are_chains_and_do_not_depend_on_order():
    words = [f"w{i}" for i in range(40)]
    head, tail = [f"h{i}" for i in range(6)], [f"t{i}" for i in range(6)]
    a, b = " ".join(words), " ".join([*words[:34], *tail])
    c = " ".join([*head, *words[6:34], *tail])
    assert similarity(shingles(a), shingles(b)) == 32 / 44
    assert similarity(shingles(a), shingles(c)) == 26 / 50 < SIMILARITY
    other = " ".join(f"v{i}" for i in range(40))
    assert groups([a, other, b, c]) == [0, 1, 0, 0]
    assert groups([a, c, other, b]) == [0, 0, 2, 0]
    assert groups([]) == []
