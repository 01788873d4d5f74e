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
    "fp8 rows": {
        "largest magnitude without sign": ("tl.max(tl.abs(values), 1)", "tl.max(values, 1)"),
        "no smallest scale": ("tl.maximum(amax, _SMALLEST)", "amax"),
        "cast not rounded": ("(q + magic - magic)", "(q)"),
        "subnormals rounded like others": ("tl.maximum(exponent, _NORMAL)", "exponent"),
        "one bit short": ("1572864.0", "3145728.0"),
        "inexact division": ("q = tl.div_rn(x, scale)", "q = x * (1.0 / scale)"),
        "tail of the row dropped": ("(d < D)[None, :]", "(d < D - 1)[None, :]"),
        "scales of another block": ("block.to(tl.int64) * N + row", "row"),
    },
    "fp8 tokens": {
        "tile runs into the next expert": ("(row < stop)", "(row < stop + 1)"),
        "last token dropped": ("(row < stop)", "(row < stop - 1)"),
        "one token early": ("first + i,", "first + i - 1,"),
        "last tile dropped": ("(P // TILE, triton", "(P // TILE - 1, triton"),
        "tokens reversed": ("* _TILE + i\n", "* _TILE + _TILE - 1 - i\n"),
        "stale scale": ("tile.to(tl.int64) * D + d, scale", "d, scale"),
    },
    "fp8 blocks": {
        "scale by the sum of rows": (
            "tl.max(tl.max(tl.abs(values), 1)",
            "tl.sum(tl.max(values, 1)",
        ),
        "swapped tile axes": (
            "tl.num_programs(1) + b) * tl.num_programs(2) + c",
            "tl.num_programs(2) + c) * tl.num_programs(1) + b",
        ),
        "weights of the first expert": ("w + e * w_e", "w"),
        "last row dropped": ("(f < F)[:, None] & (d < D)", "(f < F - 1)[:, None] & (d < D)"),
        "block one row early": ("b * _TILE + tl.arange", "b * (_TILE - 1) + tl.arange"),
    },
    "fp8 gemm": {
        "last block dropped": ("range(blocks)", "range(blocks - 1)"),
        "stale scale of x": ("            x_scale += N\n", ""),
        "stale scale of w": ("tl.load(w_scale + block)", "tl.load(w_scale)"),
        "scale of another column block": ("* columns + column) * blocks", "* columns) * blocks"),
        "swapped scale axes": ("* columns + column) * blocks", "* blocks + column) * columns"),
        "scale of the first expert": ("w_scales + (e.to(tl.int64) *", "w_scales + (0 *"),
        "weights of the first expert": ("(e.to(tl.int64) * OUT + out)[", "out["),
        "inner tail dropped": ("(k < IN)[None, :]", "(k < IN - 1)[None, :]"),
        "sum not kept": (
            "total += tl.dot(a, b) * s[:, None]\n",
            "total = tl.dot(a, b) * s[:, None]\n",
        ),
        "grid one tile short": ("tiles_bound(N, E) *", "(tiles_bound(N, E) - 1) *"),
    },
    "fp8 weight gemm": {
        "last tile dropped": ("range(start, stop)", "range(start, stop - 1)"),
        "tiles of earlier experts added": ("expert < e, tiles", "expert < 0, tiles"),
        "partly filled tile not counted": ("tl.cdiv(end - begin, TK)", "(end - begin) // TK"),
        "stale scale of dy": ("dy_scale + F,", "dy_scale,"),
        "stale scale of x": ("x_scale + D\n", "x_scale\n"),
        "scale of x forgotten": ("* s[:, None] * t[None, :]", "* s[:, None]"),
        "scale of the first tile": ("dy_scales + at * F + f", "dy_scales + f"),
        "swapped tile": ("tl.program_id(0) // columns * TM", "tl.program_id(0) % columns * TM"),
    },
}
