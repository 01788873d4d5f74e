"""Spacing, punctuation, width and case do not change the words."""

from kexa.data.words import words


def test_words_are_what_is_left_of_a_text():
    assert words("The  cat,\n\tSAT_on (3.5) Straße.") == [
        *("the", "cat", "sat_on", "3", "5", "strasse"),
    ]
    assert words("ＡＢＣ １２") == words("abc 12"), "full-width letters and digits"
    assert words("e\u0301tude") == words("étude"), "composed and decomposed letters"


def test_scripts_without_spaces_are_cut_into_characters():
    assert words("東京へ行く") == ["東", "京", "へ", "行", "く"]
    assert words("나는 학교에 간다") == ["나는", "학교에", "간다"]
    assert words("GPUで動く") == ["gpu", "で", "動", "く"]
    assert words(" \n.,") == []
