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
    "norm": {
        "eps forgotten": ("/ D + eps)", "/ D)"),
        "mean over the padded width": (
            "tl.sum(values * values, 1) / D",
            "tl.sum(values * values, 1) / BD",
        ),
        "not rounded before the weight": (
            "r[:, None]).to(y.dtype.element_ty).to(ACC)",
            "r[:, None])",
        ),
        "last row dropped": ("(row < N)[:, None]", "(row < N - 1)[:, None]"),
        "tail of the row dropped": ("(feature < D)[None, :]", "(feature < D - 1)[None, :]"),
        "gradient not projected": ("(g - normed * mean[:, None])", "g"),
        "projected without the weight": ("tl.sum(g * normed, 1)", "tl.sum(d * normed, 1)"),
        "weight's gradient holds the weight": ("tl.sum(d * normed.to", "tl.sum(g * normed.to"),
        "earlier tiles forgotten": ("total += ", "total = "),
        "one tile per program": (
            "tl.program_id(0), tl.cdiv(N, R)",
            "tl.program_id(0), tl.num_programs(0)",
        ),
        "axes not put back": ("permute(*back, -1)", "permute(*outer, -1)"),
    },
    "glu": {
        "sigmoid mirrored": ("tl.exp(-a)", "tl.exp(a)"),
        "sigmoid of the other half": ("tl.exp(-a)", "tl.exp(-b)"),
        "sigmoid alone": ("(a * s * b)", "(s * b)"),
        "derivative of the sigmoid alone": ("s * (1.0 + a * (1.0 - s))", "s * (1.0 - s)"),
        "gradients exchanged": ("d_a, d_b =", "d_b, d_a ="),
        "gate's stride taken for dense": ("gate + row * gate_n", "gate + row * F"),
        "up read with gate's stride": ("up + row * up_n", "up + row * gate_n"),
        "swapped tile": ("% columns * BF", "// columns * BF"),
        "last row dropped": ("(row < N)", "(row < N - 1)"),
        "tail of the row dropped": ("(feature < F)", "(feature < F - 1)"),
        "grid one column short": ("triton.cdiv(F, tile.BF)", "max(1, F // tile.BF)"),
    },
    "routing": {
        "selected by score": ("tl.load(keys + at", "tl.load(scores + at"),
        "weighed by key": ("score = tl.load(scores + at", "score = tl.load(keys + at"),
        "choice not taken out": ("free & (here == 0)", "free"),
        "last choice dropped": ("range(K)", "range(K - 1)"),
        "highest of equal experts": (
            "tl.min(tl.where(free & (key >= best[:, None]), expert[None, :], BE), 1)",
            "tl.max(tl.where(free & (key >= best[:, None]), expert[None, :], -1), 1)",
        ),
        "gates not scaled": ("(weights * scale)", "weights"),
        "last token not counted": (
            "inside & (free == 0)",
            "inside & (free == 0) & (token < N - 1)[:, None]",
        ),
        "order of a tile reversed": (
            "tl.cumsum(hits, 0) - hits",
            "tl.cumsum(hits, 0, reverse=True) - hits",
        ),
        "earlier tiles ignored": ("(end - total + held)", "(end - total)"),
        "expert's beginning ignored": ("(end - total + held)", "held"),
        "earlier steps of the scan forgotten": (
            "total += tl.sum(count, 0)",
            "total = tl.sum(count, 0)",
        ),
        "pair of another token": ("pair = token * K + k", "pair = token * K"),
        "no offsets without tokens": ("max(1, triton.cdiv(N, R))", "triton.cdiv(N, R)"),
        "normaliser not differentiated": ("(d_k - shared) / total", "d_k / total"),
        "gradient not scaled": ("(d_k * scale)", "d_k"),
        "gradient from the first token's scores": ("token[:, None] * E + picks", "picks"),
        "gradient of the last token dropped": (
            "(slot < K)[None, :]\n    pair = token[:, None] * K + slot[None, :]\n    picks",
            "(slot < K - 1)[None, :]\n    pair = token[:, None] * K + slot[None, :]\n    picks",
        ),
    },
}
