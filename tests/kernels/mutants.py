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
}
