"""Tile sizes of matrix products: fixed per dtype, see :mod:`kexa.kernels.launch`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl


class ProductTiles(NamedTuple):
    """An output tile of ``TM x TN``, ``TK`` of the inner axis at a time, summed in ``ACC``."""

    TM: int
    TN: int
    TK: int
    ACC: object


def product_tiles(x: torch.Tensor) -> ProductTiles:
    """128 x 128 x 64 for 16-bit types, half of each where numbers are wider."""
    if x.element_size() <= 2:
        return ProductTiles(128, 128, 64, tl.float32)
    return ProductTiles(64, 64, 32, tl.float64 if x.dtype == torch.float64 else tl.float32)
