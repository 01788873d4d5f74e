"""The six languages are told apart, and from their neighbours."""

import pytest

from kexa.data import languages
from tests.data.test_filters import TEXTS

NEIGHBOURS = {
    "fr": "Le fleuve prend sa source dans les collines et il coule vers la mer sur une distance "
    "de cent milles. Il n'est pas profond, mais le pont qui est dans la ville est du roi.",
    "it": "Il fiume nasce nelle colline e scorre per novanta miglia con la sua acqua che non è "
    "profonda, ma il ponte della città è di una grande bellezza, come si dice.",
    "pt": "O rio nasce nas colinas e corre para o mar com uma água que não é funda, mas a ponte "
    "da cidade foi obra dos monges, e os barcos não passam mais por ela em agosto.",
    "ca": "El riu neix als turons i corre cap al mar amb una aigua que no és fonda, però el pont "
    "dels monjos és a la ciutat i també els vaixells hi passen per sota des del maig.",
    "nl": "De rivier ontspringt in de heuvels en stroomt naar de zee. Het water is niet diep, maar "
    "de brug van de monniken is er een die met zorg is gebouwd en dat zie je aan het werk.",
    "ro": "Râul izvorăște în dealuri și curge spre mare. Apa nu este adâncă, dar podul de la "
    "mănăstire este o lucrare care se vede din tot orașul, cu o boltă de piatră sau două.",
    "zh": "这条河发源于城镇以北的丘陵，流经九十英里入海。河水不深，但河面很宽。",
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_six_languages_are_named(language):
    assert languages.identify(TEXTS[language]) == language


@pytest.mark.parametrize("language", NEIGHBOURS)
def test_their_neighbours_are_not_taken_for_them(language):
    assert languages.identify(NEIGHBOURS[language]) == language


@pytest.mark.parametrize(
    "text",
    ["", "12:30 45 %", "Открыть файл и закрыть окно", "lorem ipsum dolor sit amet consectetur"],
)
def test_what_it_does_not_know_is_undetermined(text):
    assert languages.identify(text) == languages.UNDETERMINED


def test_korean_with_latin_terms_stays_korean():
    text = "이 노드는 CLIP 모델과 VAE 모델을 읽어서 MODEL 출력으로 보냅니다. width 값은 정수입니다."
    assert languages.identify(text) == "ko"
