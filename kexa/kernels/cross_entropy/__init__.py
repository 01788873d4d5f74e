"""Linear cross-entropy: the head's product and the loss of its logits in one, never all logits.

    z[n] = w h[n]            loss = sum_n log(sum_v exp(z[n, v])) - z[n, target n]
    dz[n] = softmax(z[n]) - onehot(target n)            dh = dz w            dw = dz^T h

With ``z_loss`` a penalty keeps the logits' normaliser near 1 (PaLM, arXiv 2204.02311):

    loss += z_loss sum_n lse[n]^2,  lse[n] = log(sum_v exp(z[n, v]))
    dz[n] = (1 + 2 z_loss lse[n]) softmax(z[n]) - onehot(target n)

Logits are the widest tensor of a language model: 4096 tokens over 153,600 words are 2.5 GB in fp32,
and their log-softmax and gradient as much again. Here only a slice of them exists at a time.

Numbers follow h's dtype: operands of all three products (h, w, dz) have it, sums are fp32 (fp64 for
fp64), and so are logits, which no path stores. On a CPU with BF16 instructions dh, and each slice's
part of dw, are rounded to BF16 before they are added or scaled. Rounding h and w before the call is
therefore all that a numerics policy has to do.

chosen: the sum, not a loss per token. With one number to weigh all rows by, a CPU forms the
gradients beside the loss and never computes a logit twice. Where every token has a weight of its
own that follows from its probability (reinforcement learning), take the logits.

Legend: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch

from kexa.kernels.cross_entropy import sliced
from kexa.kernels.dispatch import use_triton


def linear_cross_entropy(
    h_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    z_loss: float = 0.0,
    penalties: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Summed cross-entropy in nats of the logits ``h w^T`` against ``targets``.

    Args:
        h_ND: hidden states, floating dtype.
        w_VD: the head's matrix, same dtype and device.
        targets_N: int64 in 0..V-1. On a GPU it is never read by the host, so a wrong value is not
            noticed there.
        z_loss: weight of the penalty, part of what is returned; 0 leaves it out.
        penalties: a list that receives ``z_loss sum lse^2``, a scalar without gradient.

    Returns:
        A scalar, fp64 for fp64 and fp32 else; 0 for no rows. Differentiable once in h and w.

    Raises:
        ValueError: shapes or dtypes that do not fit together; a negative ``z_loss``.
    """
    if h_ND.dim() != 2 or w_VD.dim() != 2 or h_ND.shape[1] != w_VD.shape[1]:
        raise ValueError(
            f"h {tuple(h_ND.shape)}, w {tuple(w_VD.shape)}: expected [N, D] and [V, D]"
        )
    if targets_N.shape != h_ND.shape[:1]:
        raise ValueError(f"targets {tuple(targets_N.shape)}: expected one per row, [{len(h_ND)}]")
    if h_ND.dtype != w_VD.dtype:
        raise ValueError(f"h is {h_ND.dtype} and w is {w_VD.dtype}; cast them to one dtype")
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} would reward large logits; use 0 or more")
    if use_triton(h_ND):
        from kexa.kernels.cross_entropy.triton import linear_cross_entropy as kernel

        return kernel(h_ND, w_VD, targets_N, z_loss, penalties)
    return sliced.linear_cross_entropy(h_ND, w_VD, targets_N, z_loss, penalties)
