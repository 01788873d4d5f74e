"""No text and no near-duplicate of it is on both sides."""

import random

import pytest

from kexa.data.document import Document
from kexa.data.duplicates import SIMILARITY, shingles, similarity
from kexa.data.splits import heldout


def documents() -> list[Document]:
    """200 texts with three near-duplicates each."""
    rng = random.Random(0)
    texts = []
    for i in range(200):
        words = [f"w{rng.randrange(5000)}" for _ in range(80)]
        for copy in range(4):
            changed = words.copy()
            for at in rng.sample(range(80), 4 * (copy > 0)):
                changed[at] = f"c{rng.randrange(5000)}"
            texts.append((f"{i}/{copy}", " ".join(changed)))
    return [Document(text, "s", "en", "en", name) for name, text in texts]


def test_near_duplicates_share_a_side():
    every = documents()
    sides = heldout(every, 0.2)
    sets = [shingles(d.text) for d in every]
    across = [
        (every[i].id, every[j].id)
        for i in range(len(every))
        for j in range(i)
        if sides[i] != sides[j] and similarity(sets[i], sets[j]) >= SIMILARITY
    ]
    assert across == []
    assert 0.1 < sum(sides) / len(sides) < 0.3
    alone = [int(d.hash[-13:], 16) / 16**13 < 0.2 for d in every]
    assert any(alone[4 * i] != alone[4 * i + 1] for i in range(200)), "single hashes would split"


def test_order_does_not_matter_and_distinct_additions_move_nothing():
    every = documents()
    by_id = dict(zip((d.id for d in every), heldout(every, 0.2), strict=True))
    shuffled = random.Random(1).sample(every, len(every))
    assert dict(zip((d.id for d in shuffled), heldout(shuffled, 0.2), strict=True)) == by_id
    few = heldout(every[:400], 0.2)
    assert few == [by_id[d.id] for d in every[:400]]


def test_shares_at_the_ends_and_outside():
    every = documents()[:8]
    assert heldout(every, 0.0) == [False] * 8
    assert heldout(every, 1.0) == [True] * 8
    with pytest.raises(ValueError, match=r"heldout_share=1.5 must lie in \[0, 1\]"):
        heldout(every, 1.5)
