"""Grouped GEMM as a loop over experts: the specification.

The weights are unbound once: indexing ``w[e]`` in the loop would make autograd zero-fill the
gradient of the whole stack for each expert.

Legend: N rows, D input features, F output features, E experts.
"""

from __future__ import annotations

import torch


def grouped_gemm(x_ND: torch.Tensor, w_EFD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """See :func:`kexa.kernels.grouped_gemm`."""
    ends = offsets_E.tolist()
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if min(sizes) < 0 or ends[-1] != len(x_ND):
        raise ValueError(
            f"offsets {ends} must not decrease and must end at the {len(x_ND)} rows of x"
        )
    rows = x_ND.split(sizes)
    return torch.cat([x @ w.T for x, w in zip(rows, w_EFD.unbind(), strict=True)])
