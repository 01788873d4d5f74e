"""What the tokenizer benchmark measures is what it says: text, files, checks."""

import json

from benchmarks.tokenizer import (
    Lines,
    encoding,
    gains,
    remixed,
    stream,
    strings,
    unbroken,
    unlike,
)
from kexa.tokenizer import bpe, bytes_per_token


def test_remixed_text_has_the_size_asked_and_goes_on_to_be_new(corpora):
    texts = list(remixed(corpora["ko"], 100_000, "ko"))
    assert 0 <= sum(len(t.encode()) for t in texts) - 100_000 < max(len(t.encode()) for t in texts)
    assert texts[: len(corpora["ko"])] == corpora["ko"]
    assert len(set(texts)) == len(texts) > len(corpora["ko"])
    assert texts == list(remixed(corpora["ko"], 100_000, "ko"))


def test_lines_are_read_afresh_each_time(tmp_path):
    path = tmp_path / "en"
    path.write_text("".join(json.dumps(text) + "\n" for text in ("a\nb", "한 \0")))
    lines = Lines(path)
    assert list(lines) == list(lines) == ["a\nb", "한 \0"]


def test_encoders_are_compared_on_equal_ids(tokenizer, corpora):
    rows = encoding(tokenizer, {"en": corpora["en"][:5]})
    assert rows[0]["text"] == "en"
    assert set(rows[0]["MB/s"]) == {"cold", "warm", "stock", "stock fast"}
    assert set(rows[0]["ratio"]) == {
        f"{ours} / {rival}" for ours in ("cold", "warm") for rival in ("stock", "stock fast")
    }
    assert not tokenizer.encode_special_tokens


def test_streams_are_compared_on_equal_files(tokenizer, corpora):
    (row,) = stream(tokenizer, [*corpora["en"][:5], "<|user|>", ""], processes=1)
    assert set(row["ratio"]) == {"kexa / stock", "kexa / stock fast"}


def test_a_long_document_is_compared_with_its_parts(tokenizer):
    (row,) = unbroken(tokenizer, {"letters": "a" * 25_000})
    assert row["megabytes"] == 0.025
    assert set(row["MB/s"]) == {"whole", "10 KB"}


def test_gains_are_over_the_baseline_of_the_same_size(tokenizer, baseline, corpora, config):
    held = {category: texts[:10] for category, texts in corpora.items()}
    [row] = gains(config, [config.vocab_size], corpora, held)
    assert (row["vocab_size"], row["baseline_size"]) == (1000, 667)
    for category, texts in held.items():
        ratio = bytes_per_token(tokenizer, texts) / bytes_per_token(baseline, texts)
        gain, low, high = row[category]
        assert low <= gain <= high
        assert abs(gain - 100 * (ratio - 1)) < 0.06


def test_drawn_strings_repeat_and_have_a_utf8_form():
    drawn = list(strings(300, 5, ["the of and"]))
    assert drawn == list(strings(300, 5, ["the of and"]))
    assert not any("\ud800" <= character <= "\udfff" for text in drawn for character in text)


def test_a_text_that_does_not_come_back_is_found(tokenizer):
    """Another normalisation: the superscript becomes a plain digit."""
    vocab, merges = bpe.parts(tokenizer)
    compatible = bpe.build(vocab, merges, r"\S+|\s+", "NFKC")
    assert unlike(compatible, ["x\u00b2", "x2"]) == ["x\u00b2"]
