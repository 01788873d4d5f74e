"""Tile sizes of the kernels, fixed per kernel and width of the dtype (:mod:`kexa.kernels.launch`).

``TABLE`` is for 16-bit numbers and FP8. chosen: of the candidates that compile without spilling
registers on sm_90 and sm_100, the fastest at the published shapes on an H200. Wider numbers, which
take twice the room and which only tests compute with, have one small tile for all products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl


class Tile(NamedTuple):
    """``TM x TN`` outputs of a program, ``TK`` of the inner axis at a time.

    Attention: ``TM`` of what a program owns (queries; keys in ``backward_kv``) and ``TN`` of what
    it walks over; ``TK`` is the head.
    """

    TM: int
    TN: int
    TK: int
    warps: int
    stages: int


class ProductTiles(NamedTuple):
    """What a product's kernel is told, ``ACC`` the type of its sums."""

    TM: int
    TN: int
    TK: int
    ACC: object


TABLE = {
    "attention forward": Tile(64, 64, 0, 4, 3),
    "attention backward_q": Tile(64, 64, 0, 4, 2),
    "attention backward_kv": Tile(64, 64, 0, 4, 1),
    "grouped rows": Tile(128, 256, 64, 8, 4),
    "grouped weights": Tile(128, 128, 64, 4, 3),
    "experts up": Tile(128, 128, 64, 8, 3),  # as many columns of gate, and of up
    "experts scatter": Tile(128, 256, 64, 8, 4),
    "experts back": Tile(128, 128, 64, 8, 4),
    "experts weights": Tile(128, 128, 64, 8, 4),
    "cross entropy logits": Tile(128, 128, 64, 8, 3),
    "cross entropy product": Tile(128, 256, 64, 8, 4),
    "fp8 gemm": Tile(64, 128, 128, 4, 3),  # TN and TK are the blocks of a weight
    "fp8 weight gemm": Tile(128, 64, 128, 4, 4),  # TK is the tile of tokens
}
WIDE = {
    "attention forward": Tile(32, 32, 0, 4, 2),
    "attention backward_q": Tile(32, 32, 0, 4, 2),
    "attention backward_kv": Tile(32, 16, 0, 4, 1),
    "experts up": Tile(64, 32, 32, 8, 3),
}
WIDE_PRODUCT = Tile(64, 64, 32, 8, 3)


def tile_of(kernel: str, x: torch.Tensor) -> Tile:
    """The tile with which ``kernel`` computes on the dtype of ``x``."""
    return TABLE[kernel] if x.element_size() <= 2 else WIDE.get(kernel, WIDE_PRODUCT)


def product_tiles(tile: Tile, x: torch.Tensor) -> ProductTiles:
    """The part of ``tile`` that a product's kernel takes."""
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    return ProductTiles(tile.TM, tile.TN, tile.TK, acc)
