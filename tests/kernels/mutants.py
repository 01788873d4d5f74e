"""Faults planted in the kernels, one per line of data; every one must be caught by the checks.

``FAULTS[operation][name] = (old, new)``: each occurrence of ``old`` in the operation's
``triton.py`` becomes ``new``. They are the mistakes such kernels are known for.
"""

FAULTS = {
    "attention": {
        "window one too long": ("s > t - window", "s >= t - window"),
        "query does not see itself": ("s <= t", "s < t"),
        "documents ignored": ("(query_ids[:, None] == key_ids[None, :])", "(s >= 0)"),
        "last token's tile dropped": ("tl.minimum(T, first + TQ)", "tl.minimum(T - 1, first + TQ)"),
        "output not rescaled": ("out = out * shrink[:, None] +", "out = out +"),
        "sum not rescaled": ("total = total * shrink +", "total = total +"),
        "wrong key head": ("h // R", "h % (H // R)"),
        "base e read as base 2": ("m + tl.log2(total)", "m + tl.log(total)"),
        "key tiles start late": ("first - window + 1", "first - window + TS + 1"),
        "softmax gradient without D": ("dp - d[:, None]", "dp"),
        "D of another head": ("delta + row + query", "delta + b * G * R * T + query"),
        "dk not scaled": ("(grad_k * scale_q)", "(grad_k)"),
        "queries past the tile ignored": ("first + TS - 1 + window", "first + TS"),
        "tail of the head dropped": ("(feature < K)", "(feature < K - 1)"),
    },
    "grouped": {
        "stale offset": ("offsets + expert - 1", "offsets + expert - 2"),
        "last row dropped": ("row < stop", "row < stop - 1"),
        "tile of the wrong expert": ("(tiles_end <= tile)", "(tiles_end < tile)"),
        "tile counted from the start": ("(tile - tiles_before)", "tile"),
        "swapped tile": ("tl.program_id(0) % columns * TN", "tl.program_id(0) // columns * TN"),
        "inner tail dropped": ("range(0, IN, TK)", "range(0, IN - TK + 1, TK)"),
        "rows of earlier experts added": ("range(begin, stop, TK)", "range(0, stop, TK)"),
        "ragged rows dropped": ("range(begin, stop, TK)", "range(begin, stop - TK + 1, TK)"),
        "weight not transposed": ("inner, out, w_in, w_out", "inner, out, w_out, w_in"),
        "grid one expert short": ("(N // tile.TM + E)", "(N // tile.TM + E - 1)"),
    },
    "cross entropy": {
        "words past the vocabulary counted": ('z, float("-inf"))', "z, 0.0)"),
        "largest logit not subtracted": ("largest = tl.max(z, 1)", "largest = tl.max(z, 1) * 0"),
        "tail of the hidden state dropped": ("range(0, D, TK)", "range(0, D - TK + 1, TK)"),
        "last row dropped": ("(row < N)[:, None] & (k < D)", "(row < N - 1)[:, None] & (k < D)"),
        "parts of rows mixed": ("% tiles * TM", "// tiles * TM"),
        "parts of a tile overwritten": ("parts + column.to(tl.int64) * N", "parts"),
        "target on a tile's first word missed": ("target >= column", "target > column"),
        "target sought in the first chunk only": ("(first + word)", "(word)"),
        "target not subtracted": ("grad = p - ", "grad = p + 0 * "),
        "weight of the loss ignored": ("total *= tl.load(weight)", "total *= 1.0"),
        "dh of the last chunk only": (
            "total += tl.load(out_rows, inside, other=0.0)",
            "total += 0.0",
        ),
        "swapped tile": ("tl.program_id(0) % columns * TN", "tl.program_id(0) // columns * TN"),
        "inner tail of the products dropped": ("range(0, K, TK)", "range(0, K - TK + 1, TK)"),
        "last word of the chunk dropped": ("& (word < V)[None, :])", "& (word < V - 1)[None, :])"),
        "every chunk from the first words": ("(h, w[chunk]", "(h, w[: len(w[chunk])]"),
        "dz not transposed": ("product_launch(dz.T, h", "product_launch(dz.reshape(dz.T.shape), h"),
        "grid rounded down": ("triton.cdiv(rows, tile.TM) *", "max(1, rows // tile.TM) *"),
    },
}
