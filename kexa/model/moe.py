"""Sparse mixture of experts with bias-balanced sigmoid routing.

For a token u with router rows e_i and correction bias b (reported: 128 experts, 8 used, one
shared):

    s_i = sigmoid(u . e_i)                                 in fp32
    chosen = the K largest of s_i + b_i                    b decides selection only
    g_i = scale * s_i / (sum of s over chosen + 1e-20)     weights: the unbiased scores
    y   = sum of g_i E_i(u) over chosen + E_shared(u)      shared: no gate, no scale

With ``n_group > 1`` only experts of the ``topk_group`` best groups can be chosen; a group's score
is the sum of its two largest biased scores. Routing is dropless: every chosen pair of token and
expert is computed.

Two balancing rules, both applied all through training (reported strengths: 1e-4 each):

    bias       b_i += step * sign(mean load - load_i)      per optimizer step, no gradient
    balance    loss = sum over i of f_i P_i                per sequence, then averaged
               f_i = E / (K T) * #(tokens of the sequence with i among their K largest s)
               P_i = mean over its tokens of s_i / sum_j s_j

As printed, f counts the top K of the *unbiased* scores. A sequence is one row of the batch; padding
is left out of both (chosen).

Legend: B rows, T tokens, N = B * T tokens, D hidden size, E experts, K experts per token, F expert
inner size, P = N * K pairs of token and expert, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexa.config import ModelConfig
from kexa.kernels import Routing, expert_down, expert_up, grouped_gemm, route
from kexa.model.linear import SwiGLU


class Router(nn.Module):
    """The expert centroids. Not a ``Linear``: its product is fp32 under every numerics policy."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND.float(), self.weight.float()).sigmoid()


class Experts(nn.Module):
    """The routed experts, stacked; in ``gate_up_proj [E, 2F, D]`` the gate's rows come first."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, inner))

    def forward(self, x_ND: Tensor, routing: Routing, grouped_gemm: Callable) -> Tensor:
        h_PF = expert_up(x_ND, self.gate_up_proj, routing, grouped_gemm)
        return expert_down(h_PF, self.down_proj, routing, grouped_gemm)


class SparseMoE(nn.Module):
    """Router, routed experts and shared expert of one layer.

    ``grouped_gemm(x_PD, w_EFD, offsets_E)`` multiplies the rows of each expert by that expert's
    matrix; a numerics policy may replace it, and then nothing is fused around it. ``load_E`` counts
    the tokens each expert got in training forwards since the last bias update; a forward that only
    recomputes activations sets ``counts`` to false.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.grouped_gemm: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_gemm
        self.counts = True
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(
            config.hidden_size, config.moe_intermediate_size * config.num_shared_experts
        )
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.register_buffer("load_E", torch.zeros(config.num_experts), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> SparseMoE:
        """Move with the model, but stay fp32: a bias step of 1e-4 is lost in bf16."""
        kept = {name: getattr(self, name) for name in ("e_score_correction_bias", "load_E")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, after.float() if before.is_meta else before.to(after.device))
        return self

    def forward(
        self,
        x_BTD: Tensor,
        real_BT: Tensor | None = None,
        balance: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Mix the experts. ``real_BT`` is false at padding, which neither load nor balance counts.

        A function given as ``balance`` is handed this layer's sequence-level balance loss.
        """
        x_ND = x_BTD.flatten(0, 1)
        scores_NE = self.gate(x_ND)
        routing = self.route(scores_NE)
        mixed_ND = self.experts(x_ND, routing, self.grouped_gemm)
        # not while a policy in training samples
        if self.counts and self.training and torch.is_grad_enabled():
            hits_NE = torch.zeros_like(scores_NE).scatter_(1, routing.chosen_NK, 1.0)
            counted_NE = hits_NE if real_BT is None else hits_NE * real_BT.flatten()[:, None]
            self.load_E += counted_NE.sum(0)
        if balance is not None:
            loss = self._balance(scores_NE.unflatten(0, x_BTD.shape[:2]), real_BT)
            if self.counts:  # handed over again, it would hold what was recomputed
                balance(loss)
        return mixed_ND.view_as(x_BTD) + self.shared_experts(x_BTD)

    def route(self, scores_NE: Tensor) -> Routing:
        """Experts, gates and order of all pairs."""
        keys_NE = self.selection_keys(scores_NE)
        return route(scores_NE, keys_NE, self.top_k, self.normalise, self.scale)

    def selection_keys(self, scores_NE: Tensor) -> Tensor:
        """What the top K are taken of: biased scores within the best groups."""
        biased_NE = scores_NE.detach() + self.e_score_correction_bias
        if self.n_group > 1:
            grouped = biased_NE.unflatten(1, (self.n_group, -1))
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            best = group_score.topk(self.topk_group, dim=-1).indices
            kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, best, True)
            biased_NE = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        return biased_NE

    def _balance(self, scores_BTE: Tensor, real_BT: Tensor | None) -> Tensor:
        top_BTK = scores_BTE.detach().topk(self.top_k, dim=-1).indices
        top_BTE = torch.zeros_like(scores_BTE).scatter_(2, top_BTK, 1.0)
        share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
        tokens_B1 = torch.full_like(share_BTE[:, 0, :1], scores_BTE.shape[1])
        if real_BT is not None:
            real_BT1 = real_BT[..., None].to(share_BTE.dtype)
            top_BTE, share_BTE = top_BTE * real_BT1, share_BTE * real_BT1
            tokens_B1 = real_BT1.sum(1).clamp(min=1.0)
        f_BE = top_BTE.sum(1) * scores_BTE.shape[-1] / (self.top_k * tokens_B1)
        return (f_BE * share_BTE.sum(1) / tokens_B1).sum(-1).mean()

    def update_bias(self, step: float) -> None:
        """``b += step * sign(mean load - load)``, then clear the counts."""
        self.e_score_correction_bias += step * torch.sign(self.load_E.mean() - self.load_E)
        self.load_E.zero_()
