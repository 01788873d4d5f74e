"""FP8 without a chip that has it: values the format holds, still stored as fp32.

CPUs train with this. Casting to ``torch.float8_e4m3fn`` and back is slow there; adding and
subtracting 1.5 * 2^(e + 20) rounds an fp32 number of exponent e to E4M3's four significant bits
instead, ties to even. The values equal the decoded codes of ``reference.py`` bit for bit.

Legend: N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
E4M3_MAX = 448.0
SMALLEST_AMAX = 2.0**-100  # a tile of zeros is not divided by zero
SMALLEST_NORMAL = 2.0**-6


def round_e4m3_(x: Tensor) -> Tensor:
    """Round fp32 values in -448..448 to the nearest E4M3 value in place, ties to even.

    A result of zero is +0, whatever the sign of what was rounded.
    """
    exponent = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=SMALLEST_NORMAL)
    magic = exponent.mul_(1.5 * 2.0**20)
    return x.add_(magic).sub_(magic)


def scale_of(amax: Tensor) -> Tensor:
    """The scale of tiles with these largest magnitudes.

    The divisor is a tensor: by a number, CUDA multiplies with its rounded reciprocal instead.
    """
    return amax.clamp(min=SMALLEST_AMAX) / amax.new_full((), E4M3_MAX)


def quantize(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x`` as FP8 stores it, decoded: one scale per tile ``[rows, columns]`` of the last two axes.

    Tiles at the right and lower edge may be smaller. fp32 in, fp32 out, same shape.
    """
    *_, n, d = x.shape
    padded = F.pad(x, (0, -d % columns, 0, -n % rows)) if n % rows or d % columns else x
    tiles = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    scale = scale_of(tiles.abs().amax((-3, -1), keepdim=True))
    decoded = round_e4m3_(tiles / scale).mul_(scale)
    return decoded.flatten(-4, -3).flatten(-2)[..., :n, :d]


def quantize_ragged(x_ND: Tensor, counts: Sequence[int], tile: int = TILE) -> Tensor:
    """:func:`quantize` with tiles of ``[tile, 1]`` that start anew at every expert's first row."""
    if not len(x_ND):
        return x_ND
    lengths = [min(tile, n - i) for n in counts for i in range(0, n, tile)]
    amax = torch.stack([rows.amax(0) for rows in x_ND.abs().split(lengths)])
    scale_ND = scale_of(amax).repeat_interleave(torch.tensor(lengths, device=x_ND.device), 0)
    return round_e4m3_(x_ND / scale_ND).mul_(scale_ND)
