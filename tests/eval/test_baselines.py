"""The n-gram model against one of dicts, written from the formulas; compressors by hand."""

import functools
import gzip
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from kexa.data import Document, TokenizedDocuments
from kexa.eval.baselines import (
    first_documents,
    gzip_bits_per_byte,
    joined,
    measure,
    train_ngram,
    xz_bits_per_byte,
)
from kexa.train.evaluation import HeldOut, bits_per_byte

V = 40


def stream(documents):
    ends = np.cumsum([0, *map(len, documents)])
    tokens = itertools.chain.from_iterable(documents)
    return TokenizedDocuments(np.fromiter(tokens, dtype=np.int32), ends)


def some_documents(seed, count=120, longest=30):
    """Zipfian tokens, half of them a function of the one before; [BOS] = 1 opens a document."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, V - 3)
    documents = []
    for _ in range(count):
        document = [1]
        for token in 2 + rng.choice(V - 4, size=rng.integers(0, longest), p=share / share.sum()):
            document.append(int(token) if rng.random() < 0.5 else 2 + 7 * document[-1] % (V - 4))
        documents.append(document)
    return documents


class Oracle:
    """Interpolated modified Kneser-Ney by its definition: one probability at a time."""

    def __init__(self, documents, order):
        self.order = order
        self.counts = [Counter() for _ in range(order)]
        for n in range(1, order + 1):
            before = set()
            for d in documents:
                for i in range(len(d) - n + 1):
                    if n == 1 and i == 0:
                        continue  # the first token of a document is given
                    gram = tuple(d[i : i + n])
                    if n == order or i == 0:
                        self.counts[n - 1][gram] += 1
                    elif (d[i - 1], gram) not in before:
                        before.add((d[i - 1], gram))
                        self.counts[n - 1][gram] += 1
        self.discounts = [self.fit(Counter(c.values())) for c in self.counts]

    @staticmethod
    def fit(n):
        if all(n[i] for i in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            found = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
            if min(found) > 0:
                return found
        return [0.5, 1.0, 1.5]

    @functools.cache  # noqa: B019
    def following(self, context):
        counts = self.counts[len(context)]
        return {g[-1]: c for g, c in counts.items() if g[:-1] == context}

    def probability(self, token, context):
        context = tuple(context)[max(0, len(context) - self.order + 1) :]
        shorter = self.probability(token, context[1:]) if context else 1 / V
        counts = self.following(context)
        if not counts:
            return shorter
        total = sum(counts.values())
        taken = {t: self.discounts[len(context)][min(c, 3) - 1] for t, c in counts.items()}
        kept = counts.get(token, 0) - taken.get(token, 0)
        return (kept + sum(taken.values()) * shorter) / total


def distribution(model, context):
    """Probabilities of all tokens after a context of one token or more."""
    rows = np.array([[*context, token] for token in range(V)])
    return np.exp(-model.losses(rows, np.zeros_like(rows)).reshape(V, -1)[:, -1])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_every_probability_equals_that_of_an_independent_implementation(order):
    documents = some_documents(0)
    model, oracle = train_ngram(stream(documents), order, V), Oracle(documents, order)
    unseen = some_documents(1, count=6)
    for document in unseen:
        ids = np.array([document])
        expected = [
            -math.log(oracle.probability(document[i], document[:i]))
            for i in range(1, len(document))
        ]
        np.testing.assert_allclose(model.losses(ids, np.zeros_like(ids)), expected, rtol=1e-12)


def test_that_text_takes_both_fitted_discounts_and_the_fallback():
    fitted = [Oracle(some_documents(0), order=5).discounts[n] for n in range(5)]
    assert fitted.count([0.5, 1.0, 1.5]) == 1  # of unigrams: 38 tokens, each after many others
    assert all(0 < d1 < d2 < d3 < 3 for d1, d2, d3 in fitted)


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize(
    "context",
    [[1], [1, 2], [2, 3, 2], [2, 16, 8, 24, 30], [39, 39, 39, 39], [2, 3, 39], [39, 2, 3], [5, 1]],
)
def test_probabilities_sum_to_one_after_seen_unseen_and_half_seen_contexts(order, context):
    chances = distribution(train_ngram(stream(some_documents(0)), order, V), context)
    assert chances.min() > 0
    assert chances.sum() == pytest.approx(1, abs=1e-12)


def test_an_unknown_context_is_as_good_as_none_and_a_known_one_helps():
    model = train_ngram(stream(some_documents(0)), 5, V)
    np.testing.assert_array_equal(
        distribution(model, [39, 39, 39, 2, 3]), distribution(model, [2, 3])
    )
    repeated = [[1, 5, 6, 7, 8, 9, 10]] * 30
    losses = train_ngram(stream(repeated), 5, V).losses(repeated[:1], np.zeros((1, 7)))
    assert losses.max() < 0.1


def test_counts_by_hand():
    # Bigrams "1 2", "2 3", "2 2", all fallback discounts. Before 2 stand 1 and 2, before 3 only 2.
    model = train_ngram(stream([[1, 2, 3], [1, 2, 2, 3]]), 2, V)
    lower = {2: (2 - 1.0) / 3 + (0.5 + 1.0) / 3 / V, 3: (1 - 0.5) / 3 + (0.5 + 1.0) / 3 / V}
    after_2 = {2: (1 - 0.5) / 3 + 1.5 / 3 * lower[2], 3: (2 - 1.0) / 3 + 1.5 / 3 * lower[3]}
    chances = distribution(model, [2])
    assert chances[2] == pytest.approx(after_2[2], rel=1e-12)
    assert chances[3] == pytest.approx(after_2[3], rel=1e-12)


def test_known_counts_the_tokens_before_that_were_met_and_followed():
    text = [[1, 2, 3, 4, 5], [1, 6, 3, 4]]
    rows = [[1, 2, 3, 4, 9, 3, 4, 5], [9, 2, 3, 4, 5, 4, 3, 6]]
    documents = [[0] * 8, [0] * 6 + [1] * 2]
    known = train_ngram(stream(text), 4, V).known(rows, documents)
    # nothing ever followed "9" or "5"; a document's edge ends what is known
    assert known.tolist() == [1, 2, 3, 3, 0, 1, 2, 0, 1, 2, 3, 0, 1]


def test_rows_and_documents_end_a_context():
    model = train_ngram(stream(some_documents(0)), 5, V)
    one, two = [1, 2, 16, 8, 24, 2], [1, 2, 3, 9]
    apart = [model.losses([d], np.zeros((1, len(d)))) for d in (one, two)]
    together = model.losses([one + two], [[0] * len(one) + [1] * len(two)])
    np.testing.assert_array_equal(together, np.concatenate(apart))
    cut = model.losses([one[:3], one[3:]], np.zeros((2, 3)))
    np.testing.assert_array_equal(cut[:2], apart[0][:2])
    assert len(cut) == 4  # the first token of a row is no target
    assert cut[2] == pytest.approx(-np.log(distribution(model, [8])[24]), rel=1e-12)


def test_training_knows_document_edges_too():
    model = train_ngram(stream([[1, 2, 3]] * 20 + [[1, 4, 5]] * 20), 3, V)
    np.testing.assert_array_equal(distribution(model, [3, 1]), distribution(model, [1]))


def test_documents_of_one_token_count_for_nothing():
    documents = some_documents(0)
    with_empty = train_ngram(stream([[1], *documents, [1]]), 4, V)
    for order, same in zip(
        with_empty.orders, train_ngram(stream(documents), 4, V).orders, strict=True
    ):
        np.testing.assert_array_equal(order.shares, same.shares)


def test_documents_shorter_than_the_order():
    model = train_ngram(stream([[1, 2], [1, 3]]), 5, V)
    assert distribution(model, [1]).argmax() in (2, 3)


@pytest.mark.parametrize(
    ("documents", "order", "vocab_size", "message"),
    [
        ([[1, 2]], 0, V, "order=0 must be 1 or more"),
        ([[1], [1]], 2, V, "no document has a second token"),
        ([[1, 40]], 2, V, "tokens from 1 to 40 do not fit vocab_size=40"),
    ],
)
def test_what_cannot_be_counted_is_refused(documents, order, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_ngram(stream(documents), order, vocab_size)


def test_targets_outside_the_vocabulary_are_refused():
    model = train_ngram(stream(some_documents(0)), 2, V)
    with pytest.raises(ValueError, match="do not fit vocab_size=40"):
        model.losses([[1, 40]], [[0, 0]])


def test_streams_are_joined_document_by_document():
    parts = some_documents(0, 5), some_documents(1, 3)
    whole = joined(map(stream, parts))
    assert [whole.document(i).tolist() for i in range(8)] == parts[0] + parts[1]


TEXT = "Die Katze sitzt auf der Matte und sieht dem Regen zu. "
NOISE = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 20_000)))


def test_compressors_pay_for_news_and_not_for_repetition():
    size = len(gzip.compress(NOISE.encode(), 9, mtime=0))
    assert gzip_bits_per_byte([NOISE[:9000], NOISE[9000:]]) == 8 * size / 20_000
    entropy = math.log2(95)
    for bits in (gzip_bits_per_byte([NOISE]), xz_bits_per_byte([NOISE])):
        assert entropy < bits < 1.03 * entropy
    assert gzip_bits_per_byte([TEXT] * 500) < 0.1
    assert xz_bits_per_byte([TEXT] * 500) < 0.1


def test_xz_reaches_all_that_it_read_before():
    between = "".join(map(chr, np.random.default_rng(1).integers(32, 127, 300_000)))
    assert xz_bits_per_byte([NOISE], [NOISE, between]) < 0.05
    assert xz_bits_per_byte([NOISE], [between]) > math.log2(95)


def test_bytes_are_those_of_utf8():
    assert gzip_bits_per_byte(["é" * 1000]) == 8 * len(gzip.compress(("é" * 1000).encode())) / 2000


def test_nothing_to_compress_is_an_error():
    with pytest.raises(ValueError, match="no text to compress"):
        xz_bits_per_byte([])


def documents_of(sizes):
    return [Document("x" * size, "test", "en", "en", str(i)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(("size", "count"), [(3, 1), (10, 1), (24, 2), (25, 3), (99, 3)])
def test_first_documents_fit_or_are_one(size, count):
    assert len(first_documents(documents_of([10, 10, 5]), size)) == count


def test_measure_reads_own_and_all_text():
    tokens = {"en": some_documents(0), "de": some_documents(1)}
    texts = {
        c: [Document(" ".join(map(str, d)), "test", c, c, "") for d in each]
        for c, each in tokens.items()
    }
    streams = {c: stream(each) for c, each in tokens.items()}
    ids = torch.tensor([[1, 2, 16, 8, 24, 2]])
    rows = {"de": HeldOut(ids, torch.zeros_like(ids), bytes_per_token=2.5)}
    heldout = {"de": texts["de"][:9]}
    ngram = train_ngram(joined(streams.values()), 3, V)
    found = measure(texts, streams, heldout, rows, ngram)
    for name, read in {
        "its own text": streams["de"],
        "all text": joined(streams.values()),
    }.items():
        loss = train_ngram(read, 3, V).losses(*(t.numpy() for t in (ids, torch.zeros_like(ids))))
        assert found[f"n-gram of {name}"]["de"] == bits_per_byte(loss.mean(), 2.5)
    written = [d.text for d in heldout["de"]]
    assert found["gzip"]["de"] == gzip_bits_per_byte(written)
    assert found["xz"]["de"] == xz_bits_per_byte(written)
    known = [d.text for d in texts["de"]]
    assert found["xz after its own text"]["de"] == xz_bits_per_byte(written, known)
    assert all(list(figures) == ["de"] for figures in found.values())
