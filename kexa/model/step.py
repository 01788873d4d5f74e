"""One decoder layer on the few tokens of a decoding step, in as few operations as they need.

On a CPU a step on one token is made of hundreds of operations of some microseconds each, and of
reading each weight once. This is the layer of ``transformer`` (or ``mtp``) with the same equations
and the same weights, written for that case:

    q, k, v             one product; q and k are normed and rotated as one tensor
    gate and up         one product, of the shared expert too
    RMSNorm, fp32       x w sqrt(D) / hypot(|x|, sqrt(D eps)), which is x w / sqrt(mean x^2 + eps)
    residual sums       inside the products that they follow
    experts             for each expert that was chosen two products with its own matrices

It runs where nothing is learnt and every product is the plain one: :func:`applies`. Joined matrices
are copies, made once per cache. A cache belongs to the weights that filled it, so they cannot go
stale while it is of use; the experts' matrices, nearly all of a model, are never copied.

Results differ from the layer's own by rounding: sums of two products are taken in another order.

Legend: B rows, T tokens, N = B * T, D hidden size, H query heads, G key-value heads, K head size,
F inner size, E experts, C chosen experts per token, P = N * C pairs of token and expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexa.kernels import decode_attention, grouped_gemm, use_triton
from kexa.kernels.routing.reference import select
from kexa.model.attention import Context, unchanged
from kexa.model.cache import LayerCache
from kexa.model.linear import Linear, RMSNorm, SwiGLU
from kexa.model.moe import SparseMoE


def applies(layer: nn.Module) -> bool:
    """Whether ``layer`` may take this path: on a CPU, no numerics policy."""
    weight = layer.input_layernorm.weight
    if weight.device.type != "cpu" or use_triton(weight):
        return False
    for module in layer.modules():
        if isinstance(module, Linear) and module.matmul is not F.linear:
            return False
        if isinstance(module, SparseMoE) and module.grouped_gemm is not grouped_gemm:
            return False
    return True


def takes_step(layer: nn.Module, context: Context, cache: LayerCache | None) -> bool:
    """Whether this call is a step behind a prompt; ``cache.layer_step`` then does it."""
    if cache is None or context.step.start_B is None or torch.is_grad_enabled():
        return False
    if cache.takes_step is None:
        cache.takes_step = applies(layer)
        cache.layer_step = LayerStep(layer) if cache.takes_step else None
    return cache.takes_step


class LayerStep:
    """``layer`` with its matrices joined; call it as the layer, behind a prompt in the cache."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.window, self.use_rope = attention.window, attention.use_rope
        self.head_dim = attention.head_dim
        self.kv_heads = attention.k_proj.weight.shape[0] // attention.head_dim
        self.heads = attention.q_proj.weight.shape[0] // attention.head_dim
        self.norm_attention = _norm(layer.input_layernorm)
        self.qkv_DX = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.norm_heads = _head_norm(attention.q_norm, attention.k_norm, self.heads, self.kv_heads)
        self.o_XD = attention.o_proj.weight.T
        self.norm_mlp = _norm(layer.post_attention_layernorm)
        self.moe = mlp if isinstance(mlp, SparseMoE) else None
        dense: SwiGLU = mlp if self.moe is None else mlp.shared_experts
        self.gate_up_DF = _joined(dense.gate_proj, dense.up_proj)
        self.down_FD = dense.down_proj.weight.T
        if self.moe is not None:
            self.expert_up_DF = mlp.experts.gate_up_proj.mT.unbind()
            self.expert_down_FD = mlp.experts.down_proj.mT.unbind()

    def __call__(self, x_BTD: Tensor, context: Context, cache: LayerCache) -> Tensor:
        x_ND = self._attention(x_BTD, context, cache)
        normed_ND = self.norm_mlp(x_ND)
        if self.moe is not None:
            x_ND = x_ND + self._experts(normed_ND)
        x_ND = torch.addmm(x_ND, _swiglu(normed_ND.mm(self.gate_up_DF)), self.down_FD)
        return x_ND.view(x_BTD.shape)

    def _attention(self, x_BTD: Tensor, context: Context, cache: LayerCache) -> Tensor:
        """x + Attention(RMSNorm(x)), as [N, D]."""
        B, T, _ = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        heads = self.norm_attention(x_ND).mm(self.qkv_DX).view(B, T, -1, self.head_dim)
        qk, v_BTGK = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        qk = self.norm_heads(qk).transpose(1, 2)
        if self.use_rope:
            qk = torch.addcmul(
                qk * context.cos_TK, qk.roll(self.head_dim // 2, -1), context.turn_TK
            )
        q_BHTK, k_BGTK = qk.split((self.heads, self.kv_heads), dim=1)
        step = context.step
        keys_BGSK, values_BGSK, mask = cache.update(k_BGTK, v_BTGK.transpose(1, 2), step)
        where = (step.positions_BT, step.start_B, self.window, mask)
        out_BHTK = decode_attention(q_BHTK, keys_BGSK, values_BGSK, *where)
        return torch.addmm(x_ND, out_BHTK.transpose(1, 2).reshape(B * T, -1), self.o_XD)

    def _experts(self, x_ND: Tensor) -> Tensor:
        """The routed experts' weighted sum."""
        moe = self.moe
        scores_NE = moe.gate(x_ND)
        keys_NE = moe.selection_keys(scores_NE)
        chosen_NC, gates_NC = select(scores_NE, keys_NE, moe.top_k, moe.normalise, moe.scale)
        if len(x_ND) == 1:
            return self._experts_of_one(x_ND, chosen_NC[0].tolist(), gates_NC[0])
        sorted_P, order_P = chosen_NC.flatten().sort(stable=True)
        rows = Counter(sorted_P.tolist())  # how many rows each chosen expert has, in order
        counts = tuple(rows.values())
        rows_PD = x_ND.index_select(0, order_P // moe.top_k)
        up_PF = torch.cat(
            [x.mm(self.expert_up_DF[e]) for e, x in zip(rows, rows_PD.split(counts), strict=True)]
        )
        h_PF = _swiglu(up_PF)
        out_PD = torch.cat(
            [h.mm(self.expert_down_FD[e]) for e, h in zip(rows, h_PF.split(counts), strict=True)]
        )
        out_NCD = out_PD.index_select(0, order_P.argsort()).view(*gates_NC.shape, -1)
        return torch.bmm(gates_NC[:, None].to(out_NCD.dtype), out_NCD)[:, 0]

    def _experts_of_one(self, x_1D: Tensor, chosen: list[int], gates_C: Tensor) -> Tensor:
        h_CF = _swiglu(torch.cat([x_1D.mm(self.expert_up_DF[e]) for e in chosen]))
        h_CF = h_CF * gates_C[:, None].to(h_CF.dtype)
        y_1D = None
        for e, h_1F in zip(chosen, h_CF.split(1), strict=True):
            w_FD = self.expert_down_FD[e]
            y_1D = h_1F.mm(w_FD) if y_1D is None else y_1D.addmm_(h_1F, w_FD)
        return y_1D


class _FewOperationsNorm:
    """RMSNorm in fp32; ``weight [..., D]`` may differ along axes before the last."""

    def __init__(self, weight: Tensor, eps: float):
        size = weight.shape[-1]
        self.weight = weight * size**0.5
        self.least = torch.tensor((size * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return (x * self.weight).div_(length.hypot_(self.least))


def _norm(norm: RMSNorm) -> Callable[[Tensor], Tensor]:
    """Only fp32: other dtypes are rounded to their own before the weight."""
    if norm.weight.dtype != torch.float32:
        return norm
    return _FewOperationsNorm(norm.weight, norm.eps)


def _head_norm(
    q_norm: nn.Module, k_norm: nn.Module, heads: int, kv_heads: int
) -> Callable[[Tensor], Tensor]:
    """QK-norm of ``[B, T, H + G, K]``, where there is one."""
    if not isinstance(q_norm, RMSNorm):
        return unchanged
    if q_norm.weight.dtype != torch.float32:
        return lambda x: torch.cat((q_norm(x[:, :, :heads]), k_norm(x[:, :, heads:])), dim=2)
    weight_XK = torch.cat((q_norm.weight.expand(heads, -1), k_norm.weight.expand(kv_heads, -1)))
    return _FewOperationsNorm(weight_XK, q_norm.eps)


def _joined(*linears: Linear) -> Tensor:
    """The matrices side by side, ``[D, sum of F]``, laid out as one product reads them fastest."""
    return torch.cat([linear.weight for linear in linears]).T.contiguous()


def _swiglu(gate_up_NF: Tensor) -> Tensor:
    gate_NF, up_NF = gate_up_NF.chunk(2, -1)
    return F.silu(gate_NF) * up_NF
