"""Cached decoding equals the full forward pass, whatever the order in which tokens arrive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

CLOSE = {"atol": 3e-5, "rtol": 0.0}  # fp32, other order of summation


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "sizes", [[1] * 40, [17] + [1] * 23, [3, 4, 1, 4, 2] * 3, [40], [33, 4, 3]]
)
def test_any_split_over_window_wraps_equals_one_forward(build, ids, sizes):
    model = build()
    x = ids(2, sum(sizes))
    cache = model.new_cache(2, chunk=4)
    parts = [model(part, cache=cache) for part in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x), **CLOSE)


def test_ragged_batch_equals_each_row_alone(build, ids):
    model, lengths, steps = build(), [3, 11, 8], 20
    rows = [ids(1, n + steps) for n in lengths]
    prompt = torch.cat([F.pad(r[:, :n], (11 - n, 0)) for r, n in zip(rows, lengths, strict=True)])
    documents = -(torch.arange(11) < 11 - torch.tensor(lengths)[:, None]).long()
    cache = model.new_cache(3)
    logits = [model(prompt, documents, cache=cache)[:, -1:]]
    for i in range(steps):
        logits.append(
            model(
                torch.cat([r[:, n + i, None] for r, n in zip(rows, lengths, strict=True)]),
                cache=cache,
            )
        )
    logits = torch.cat(logits, dim=1)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        torch.testing.assert_close(logits[b], model(row)[0, n - 1 :], **CLOSE)


def test_rows_may_take_back_different_numbers_of_tokens(build, ids):
    model, x, noise = build(), ids(2, 40), ids(2, 40)
    cache = model.new_cache(2, chunk=3)
    model(x[:, :9], cache=cache)
    at = torch.tensor([9, 9])
    while int(at.max()) < 37:
        # Three tokens each; of row 0 one is right, of row 1 two or three.
        right = torch.tensor([1, 2 + int(at[1]) % 2])
        column = at[:, None] + torch.arange(3)
        tokens = torch.where(
            torch.arange(3) < right[:, None], x.gather(1, column), noise.gather(1, column)
        )
        logits = model(tokens, cache=cache)
        for b in range(2):
            expected = model(x[b : b + 1, : at[b] + right[b]])[0, at[b] :]
            torch.testing.assert_close(logits[b, : right[b]], expected, **CLOSE)
        cache.roll_back(3 - right)
        at = at + right
    assert cache.length_B.tolist() == at.tolist()


def test_dropped_rows_leave_the_others_unchanged(build, ids):
    model, x = build(), ids(4, 30)
    cache = model.new_cache(4)
    model(x[:, :12], cache=cache)
    kept = torch.tensor([3, 1])
    cache.keep_rows(kept)
    parts = [model(x[kept, i, None], cache=cache) for i in range(12, 30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x[kept])[:, 12:], **CLOSE)


def test_window_layers_hold_a_window_and_a_chunk(build, ids):
    model = build()
    cache = model.new_cache(1, chunk=4)
    model(ids(1, 100), cache=cache)
    slots = [layer.key_BGSK.shape[2] for layer in cache.layers]
    assert slots[:3] == [9, 9, 9] and slots[3] >= 100


@pytest.mark.parametrize(("before", "after"), [(9, 1), (2, 7), (4, 4)])
@pytest.mark.parametrize("length", [2, 5, 6, 33])
def test_a_new_chunk_keeps_what_windows_see(build, ids, before, after, length):
    model, x = build(), ids(2, 48)
    cache = model.new_cache(2, chunk=before)
    model(x[:, :length], cache=cache)
    cache.roll_back(torch.tensor([0, 1]))
    cache.set_chunk(after)
    assert [layer.key_BGSK.shape[2] for layer in cache.layers[:3]] == [5 + after] * 3
    rows = [x[0, length:], x[1, length - 1 :]]
    for t in range(14):
        logits = model(torch.stack([row[t : t + 1] for row in rows]), cache=cache)
        for b, start in enumerate((length, length - 1)):
            expected = model(x[b : b + 1, : start + t + 1])[0, -1]
            torch.testing.assert_close(logits[b, 0], expected, **CLOSE)


def test_misuse_is_named(build, ids):
    model = build()
    cache = model.new_cache(2, chunk=4)
    model(ids(2, 6), cache=cache)
    with pytest.raises(ValueError, match="5 new tokens"):
        model(ids(2, 5), cache=cache)
    with pytest.raises(ValueError, match="batch of 3"):
        model(ids(3, 1), cache=cache)
    with pytest.raises(ValueError, match="first call"):
        model(ids(2, 1), torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="take back 5"):
        cache.roll_back(5)
    with pytest.raises(ValueError, match="take back -1"):
        cache.roll_back(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="258 tokens"):
        model(ids(2, 252), cache=cache)
    with pytest.raises(ValueError, match="chunk=0"):
        model.new_cache(1, chunk=0)
