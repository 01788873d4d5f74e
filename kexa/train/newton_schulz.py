"""Newton-Schulz: the nearest matrix with equal singular values, by matrix products alone.

For X of size [m, n], m <= n, scaled to norm 1, five steps of

    X <- P X,     P = a I + b A + c A^2,     A = X X^T

bring all singular values between about 0.7 and 1.2 and keep the singular vectors (Keller Jordan et
al., 2024). The plain form counts 5 (4 m^2 n + 2 m^3) floating-point operations.

P is a polynomial of A and commutes with it. So k steps can run on the m x m Gram matrix and touch X
at both ends only:

    G = X X^T,  Q = I;     k times:  P = a I + b G + c G^2,   Q <- P Q,   G <- P G P;     X <- Q X

which counts 4 m^2 n + (8 k - 6) m^3: the first Q is P itself and the last G is not needed. Squaring
costs precision: rounding errors of G stand beside its smallest eigenvalues, may be negative, and
grow by a^2 = 12 per step, where the plain form computes a fresh A from X. Therefore five steps are
3 + 2 with G computed anew between them, in all 8 m^2 n + 28 m^3: three quarters of the plain form
at n = 3 m (0.743), equal at n = 1.5 m. All products are counted in full: PyTorch has none that
computes half of a symmetric result.

Measured in BF16 on 96 x 192 and 256 x 512 with 17 spectra each (flat, power laws, one or many
directions 3 to 10,000 times the rest), largest singular value: 87,000 in one go, 1.33 as 2 + 3,
1.22 as 3 + 2, and 1.21 in the plain form. The relative error against fp64 of 3 + 2 is at most that
of the plain form plus 0.04.

chosen: the Gram form where it counts fewer operations and m is at least 512. Below, the m x m
products are too small to fill a GPU and its time goes into launches, of which the plain form has
fewer. fp32 on CPU, BF16 on GPU, fp64 for fp64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
RESTARTS = (3, 2)  # steps of the Gram form between fresh Gram matrices
SMALLEST_GRAM = 512
BATCH = 2**27  # elements orthogonalised at once: what bounds the memory of a step


def orthogonalize(x: Tensor) -> Tensor:
    """Newton-Schulz on ``[..., m, n]``: singular values go to about 1, singular vectors stay.

    Returns a new tensor of the same shape, in the dtype it ran in: fp32 on CPU, bf16 on GPU, and
        fp64 for fp64.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if x.dtype != torch.float64:
        x = x.float()
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    if x.is_cuda and x.dtype != torch.float64:
        x = x.bfloat16()
    x = gram_form(x) if takes_gram_form(*x.shape[-2:]) else plain_form(x)
    return x.mT if tall else x


def plain_form(x: Tensor) -> Tensor:
    """The five steps on ``[..., m, n]`` with m <= n and singular values of at most 1."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        a_MM = x @ x.mT
        x = a * x + (b * a_MM + c * (a_MM @ a_MM)) @ x
    return x


def gram_form(x: Tensor) -> Tensor:
    """The same five steps on Gram matrices."""
    a, b, c = COEFFICIENTS
    x_BMN = x.flatten(0, -3) if x.ndim > 2 else x[None]
    for steps in RESTARTS:
        g_BMM = x_BMN @ x_BMN.mT
        for step in range(steps):
            # r = P - a I: products with P add a multiple of the other factor instead
            r_BMM = torch.baddbmm(g_BMM, g_BMM, g_BMM, beta=b, alpha=c)
            if step == 0:
                q_BMM = r_BMM.clone()
                q_BMM.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                q_BMM = torch.baddbmm(q_BMM, r_BMM, q_BMM, beta=a)
            if step < steps - 1:
                p_BMM = torch.baddbmm(g_BMM, r_BMM, g_BMM, beta=a)
                g_BMM = torch.baddbmm(p_BMM, p_BMM, r_BMM, beta=a)
        x_BMN = q_BMM @ x_BMN
    return x_BMN.view(x.shape)


def takes_gram_form(m: int, n: int) -> bool:
    """Whether a matrix of this size, on whichever side it comes, is orthogonalised in Gram form."""
    return min(m, n) >= SMALLEST_GRAM and gram_flops(m, n) < plain_flops(m, n)


def orthogonalize_flops(m: int, n: int) -> int:
    """Floating-point operations of the matrix products of :func:`orthogonalize`, one matrix.

    A multiplication and an addition are two. ``orthogonalize_flops(6144, 2048)`` is 0.743 times
    ``plain_flops(6144, 2048)``.
    """
    return gram_flops(m, n) if takes_gram_form(m, n) else plain_flops(m, n)


def plain_flops(m: int, n: int) -> int:
    """Of :func:`plain_form`."""
    m, n = min(m, n), max(m, n)
    return STEPS * (4 * m * m * n + 2 * m**3)


def gram_flops(m: int, n: int) -> int:
    """Of :func:`gram_form`."""
    m, n = min(m, n), max(m, n)
    return sum(4 * m * m * n + (8 * steps - 6) * m**3 for steps in RESTARTS)


def orthogonalize_all(stacks: Sequence[Tensor]) -> list[Tensor]:
    """:func:`orthogonalize` of many stacks ``[B, m, n]``; matrices of one size share a batch.

    A matrix and one of the transposed size share it as well. A batch ends after :data:`BATCH`
    elements, stacks are not divided.
    """
    elements: dict[tuple, int] = defaultdict(int)
    batches: dict[tuple, list[int]] = defaultdict(list)
    for i, x in enumerate(stacks):
        size = (min(x.shape[1:]), max(x.shape[1:]), x.dtype, x.device)
        batches[*size, elements[size] // BATCH].append(i)
        elements[size] += x.numel()
    done: dict[int, Tensor] = {}
    for members in batches.values():
        tall = [stacks[i].shape[1] > stacks[i].shape[2] for i in members]
        wide = [stacks[i].mT if t else stacks[i] for i, t in zip(members, tall, strict=True)]
        o_BMN = orthogonalize(torch.cat(wide))
        parts = o_BMN.split([len(x) for x in wide])
        done |= {i: o.mT if t else o for i, t, o in zip(members, tall, parts, strict=True)}
    return [done[i] for i in range(len(stacks))]
