"""FP8 as its definition: codes and scales, and products of what they stand for. The specification.

    scale = max(amax(tile), 2^-100) / 448,   code = E4M3(x / scale),   value = code * scale

Products decode both operands and multiply in fp32, or in fp64 where that is asked for.

Legend: N tokens, D inputs, F outputs, E experts, T tiles of 128 tokens, P = 128 T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kexa.kernels.fp8.emulated import TILE, round_e4m3_, scale_of
from kexa.kernels.grouped import reference as grouped


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`kexa.kernels.quantize_rows`."""
    codes_ND, scales_NB = _quantize(x_ND, 1)
    return codes_ND, scales_NB.T.contiguous()


def quantize_tokens(x_ND: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`kexa.kernels.quantize_tokens`."""
    N, D = x_ND.shape
    ends = offsets_E.tolist()
    padded_PD = x_ND.new_zeros(tiles_bound(N, len(ends)) * TILE, D)
    at = 0
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        padded_PD[at : at + end - start] = x_ND[start:end]
        at += -(-(end - start) // TILE) * TILE
    codes_DP, scales_DT = _quantize(padded_PD.T, 1)
    return codes_DP, scales_DT.T.contiguous()


def quantize_blocks(w_EFD: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`kexa.kernels.quantize_blocks`."""
    return _quantize(w_EFD, TILE)


def transposed(codes_EFD: Tensor, scales_EBC: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`kexa.kernels.transposed`."""
    return codes_EFD.mT.contiguous(), scales_EBC.mT.contiguous()


def scaled_gemm(
    x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], offsets_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :func:`kexa.kernels.scaled_gemm`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_ND, w_EFD = decode_rows(*x).to(wide), decode_blocks(*w).to(wide)
    return grouped.grouped_gemm(x_ND, w_EFD, offsets_E).to(dtype)


def scaled_weight_gemm(
    dy: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor], offsets_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """See :func:`kexa.kernels.scaled_weight_gemm`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dy_FP, x_DP = decode_rows(*dy).to(wide), decode_rows(*x).to(wide)
    counts = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
    padded = [-(-n // TILE) * TILE for n in counts]
    padded.append(x_DP.shape[1] - sum(padded))  # tiles that no expert has
    pairs = zip(dy_FP.split(padded, 1)[:-1], x_DP.split(padded, 1)[:-1], strict=True)
    return torch.stack([a @ b.T for a, b in pairs]).to(dtype)


def decode_rows(codes_MK: Tensor, scales_BM: Tensor) -> Tensor:
    """fp32 values of codes with one scale per row and 128 columns; of tokens' codes too."""
    return codes_MK.float() * _spread(scales_BM.T, 1, codes_MK.shape)


def decode_blocks(codes_EFD: Tensor, scales_EBC: Tensor) -> Tensor:
    """fp32 values of codes with one scale per 128 x 128 block."""
    return codes_EFD.float() * _spread(scales_EBC, TILE, codes_EFD.shape)


def tiles_bound(tokens: int, experts: int) -> int:
    """Tiles of 128 tokens that suffice however the tokens fall: one may be partly filled each."""
    return tokens // TILE + experts


def _quantize(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Codes ``[..., n, d]`` and scales ``[..., ceil(n / rows), ceil(d / 128)]``."""
    *_, n, d = x.shape
    padded = F.pad(x.float(), (0, -d % TILE, 0, -n % rows))
    tiles = padded.unflatten(-1, (-1, TILE)).unflatten(-3, (-1, rows))
    scale = scale_of(tiles.abs().amax((-3, -1), keepdim=True))
    codes = round_e4m3_(tiles / scale).to(torch.float8_e4m3fn)
    codes = codes.flatten(-4, -3).flatten(-2)[..., :n, :d].contiguous()
    return codes, scale[..., 0, :, 0]


def _spread(scales: Tensor, rows: int, shape: torch.Size) -> Tensor:
    """One scale per code."""
    spread = scales.repeat_interleave(rows, -2).repeat_interleave(TILE, -1)
    return spread[..., : shape[-2], : shape[-1]]
