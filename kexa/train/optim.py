"""Muon for matrices and stacks of matrices, AdamW for the rest.

Muon replaces a matrix's momentum by the nearest matrix with equal singular values (Keller Jordan
et al., 2024), with the scale and decay of Moonlight (arXiv 2502.16982). For every matrix W of
size [m, n]:

    M <- mu M + G                                momentum
    U  = G + mu M   (Nesterov)   or   M
    O  = NewtonSchulz(U)                         U = P S Q^T  ->  O close to P Q^T
    W <- W (1 - lr * decay) - lr * 0.2 * sqrt(max(m, n)) * O

The factor 0.2 sqrt(max(m, n)) gives the update the root mean square of an AdamW update, so both
optimizers share one learning rate. Newton-Schulz ends with singular values between about 0.7 and
1.2, not at 1: :mod:`kexa.train.newton_schulz`.

Parameters may be sharded by FSDP2. Momentum, decay and weights stay where they are; of matrices
whose rows are cut every rank orthogonalises its share, and nobody gathers all of them:
:mod:`kexa.train.dealing`. Stacks of experts are cut between experts and need no communication.

reported: Muon in all stages (the report cites Moonlight).
not reported: its hyper-parameters and what bypasses it. chosen: Moonlight's (mu = 0.95, Nesterov,
decay 0.1, AdamW with betas 0.9 and 0.95 for embedding, head and norms); the router also stays
with AdamW, since its rows are one vector per expert rather than a map between feature spaces.
chosen: a stack [E, m, n] is E matrices, and fused gate and up weights [E, 2F, D] are 2E: each is
orthogonalised alone, as it would be unfused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kexa.train.dealing import Dealing, deal, local, row_group
from kexa.train.newton_schulz import orthogonalize_all, orthogonalize_flops


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay for parameters of shape ``[..., m, n]``, sharded or not.

    Args:
        params: parameters or groups. A group may set ``parts``: how many matrices lie side by side
            along ``m`` in each of its parameters (2 for fused gate and up weights).
        lr: learning rate. weight_decay: decoupled, multiplied by ``lr``.
        momentum: mu. nesterov: look one step ahead.

    Raises:
        ValueError: a parameter with fewer than two dimensions, or ``m`` not divisible by ``parts``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        parts: int = 1,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"nesterov": nesterov, "parts": parts})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon takes matrices; give shape {tuple(p.shape)} to AdamW")
                if p.shape[-2] % group["parts"]:
                    raise ValueError(
                        f"{tuple(p.shape)} does not split into {group['parts']} matrices along m"
                    )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient: on all ranks the same parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        weights = [local(p) for p in params]
        grads = [local(p.grad) for p in params]
        moments = [local(self.state[p]["momentum"]) for p in params]
        torch._foreach_mul_(moments, group["momentum"])
        torch._foreach_add_(moments, grads)
        updates = (
            torch._foreach_add(grads, moments, alpha=group["momentum"])
            if group["nesterov"]
            else moments
        )
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])

        whole, cut = [], defaultdict(list)  # cut: matrices of which this rank holds some rows
        for p, weight, update in zip(params, weights, updates, strict=True):
            ranks = row_group(p)
            if ranks is not None:
                cut[ranks, p.dtype].append((p.shape, weight, update))
            elif weight.numel():  # of a short stack a rank may hold nothing
                whole.append((weight, update))
        self._update_whole(group, whole)
        for (ranks, _), members in cut.items():
            self._update_cut(group, members, ranks)

    def _update_whole(self, group: dict[str, Any], members: list[tuple[Tensor, Tensor]]) -> None:
        stacks = [_matrices(update, group["parts"]) for _, update in members]
        changes = orthogonalize_all(stacks)
        for (weight, _), o_BMN in zip(members, changes, strict=True):
            m, n = o_BMN.shape[1:]
            weight.view(-1, m, n).add_(o_BMN.to(weight.dtype), alpha=_scale(group, m, n))

    def _update_cut(
        self, group: dict[str, Any], members: list[tuple], ranks: dist.ProcessGroup
    ) -> None:
        sizes = [tuple(shape) for shape, _, _ in members]
        costs = [orthogonalize_flops(m, n) for m, n in sizes]
        dealing = Dealing(sizes, deal(costs, ranks.size()), ranks)
        owned = dealing.gather([update for _, _, update in members])
        changes = orthogonalize_all([_matrices(x, group["parts"]) for x in owned])
        rows = dealing.scatter([o_BMN.flatten(0, 1) for o_BMN in changes], members[0][1])
        for ((m, n), weight, _), o in zip(members, rows, strict=True):
            weight.add_(o.to(weight.dtype), alpha=_scale(group, m // group["parts"], n))


def _matrices(x: Tensor, parts: int) -> Tensor:
    """``[..., parts * m, n]`` as a stack ``[B, m, n]``."""
    return x.view(-1, x.shape[-2] // parts, x.shape[-1])


def _scale(group: dict[str, Any], m: int, n: int) -> float:
    """What multiplies O of a matrix [m, n]."""
    return -group["lr"] * 0.2 * math.sqrt(max(m, n))


def role(name: str) -> str:
    """What a parameter of :class:`kexa.model.KexaForCausalLM` is to the optimizers, by name."""
    module = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
    if module in ("embed_tokens", "lm_head"):
        return module
    if module.endswith("norm") or "norm_" in module:
        return "norm"
    if module == "gate":
        return "router"
    return "gate_up" if module == "gate_up_proj" else "matrix"


def build_optimizers(
    model: torch.nn.Module, config: Any, matrices: str = "muon"
) -> list[torch.optim.Optimizer]:
    """``[Muon, AdamW]`` over the trainable parameters of a model.

    Args:
        config: has ``learning_rate`` and ``weight_decay``; :class:`kexa.config.PretrainConfig` is
            one.
        matrices: "muon", or "adamw" to leave them to AdamW as well, which is then the only one.

    Raises:
        ValueError: another word for ``matrices``.

    Norms do not decay. Matrices fused by rows are split by Muon; see :func:`grouping` for the
    table.
    """
    if matrices not in ("muon", "adamw"):
        raise ValueError(f"matrices={matrices!r}; use 'muon' or 'adamw'")
    roles: dict[str, list[Tensor]] = defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            roles[role(name)].append(p)
    lr, decay = config.learning_rate, config.weight_decay
    muon = [
        {"params": roles[r], "parts": parts}
        for r, parts in (("matrix", 1), ("gate_up", 2))
        if roles[r] and matrices == "muon"
    ]
    others = ("embed_tokens", "lm_head", "router", "norm")
    adam = [
        {"params": roles[r], "weight_decay": 0.0 if r == "norm" else decay}
        for r in (others if muon else (*others, "matrix", "gate_up"))
        if roles[r]
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, lr=lr, weight_decay=decay))
    if adam:
        optimizers.append(torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True))
    return optimizers


def build_adamw(model: torch.nn.Module, config: Any) -> list[torch.optim.Optimizer]:
    """``[AdamW]`` over all trainable parameters: for policy gradients. ``config`` as above.

    chosen: Muon gives every direction of an update the same size, and most directions of a policy
    gradient from a few hundred samples are noise; AdamW keeps the strong ones ahead.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr, decay = config.learning_rate, config.weight_decay
    adamw = torch.optim.AdamW(
        parameters, lr=lr, weight_decay=decay, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    return [adamw]


def move_states(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move what an optimizer holds for its parameters to a device; sharded states stay sharded.

    Counters, tensors without dimensions, stay where they are.
    """
    for states in optimizer.state.values():
        for name, value in states.items():
            if isinstance(value, Tensor) and value.dim():
                states[name] = value.to(device)


def grouping(model: torch.nn.Module) -> str:
    """A table of which parameters go where: tensors, matrices and parameters of every role."""
    takes = {"matrix": "Muon", "gate_up": "Muon, two matrices per expert"}
    rows: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            r = role(name)
            row = rows.setdefault(r, [0, 0, 0])
            row[0] += 1
            row[1] += (p[..., 0, 0].numel() * (2 if r == "gate_up" else 1)) if r in takes else 0
            row[2] += p.numel()
    lines = [f"{'role':<14}{'tensors':>8}{'matrices':>10}{'parameters':>14}  optimizer"]
    for r, (tensors, matrices, size) in rows.items():
        lines.append(
            f"{r:<14}{tensors:>8}{matrices or '-':>10}{size:>14,}  {takes.get(r, 'AdamW')}"
        )
    return "\n".join(lines)
