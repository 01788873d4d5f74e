"""What a run can say of its inside: experts, logits, gradients, updates, FP8.

Every step, from what it counted anyway (:func:`scalars`):

    losses, learning_rate, grad_norm, tokens, skipped
    violation/<sparse>         max load / mean load - 1 over the experts (Wang et al., 2408.15664)

Every ``metrics_every`` steps, measured while the step runs (:class:`Monitor`):

    router_entropy/<sparse>    mean over tokens of -sum_i p_i log p_i, p = s / sum s, in nats; log E
                               is a router without a preference
    attention_logit/<layer>    largest q . k / sqrt(K) that a query may see
    head_logit, head_log_z     largest logit over the counted targets; their mean log-normaliser
    grad_norm/<role>           norm of the gradient before clipping, by role of kexa.train.optim
    update_rms/<role>          root mean square of what the step added to the parameters
    fp8_amax/<operand>         largest magnitude of "fprop x", "fprop w", "dgrad dy", "dgrad w",
                               "wgrad dy" or "wgrad x", over all products of the recipe
    fp8_underflow/<operand>    share of its nonzero numbers that FP8 rounds to zero

<layer> counts from 0, then comes "mtp"; <sparse> counts the sparse layers, as ``Step.expert_load``.

No kernel leaves logits behind, so theirs are computed once more, in slices, and FP8 operands are
rounded once more: a measured step holds a copy of the parameters and takes longer (1.8 times in
FP8, 1.3 times in fp32, at smoke on one CPU core). chosen: hence the period. Hooks and replaced
functions look at tensors and pass them on, are put in when such a step begins and taken out when it
ends: training has the same bits with them, and all other steps run the same code.

A skipped update has an update of zero. Padding counts in everything but the head's figures. On
several ranks these figures are of rank 0: of the rows it reads, and of its part of gradients,
updates and experts. ``violation`` and the losses are of all ranks.

Legend: N rows, D hidden size, V vocabulary, B batch, T tokens, H query heads, G key-value heads, K
head size, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kexa.model.attention import Attention, Context
from kexa.model.linear import Head, Linear
from kexa.model.moe import Router, SparseMoE
from kexa.train.fp8 import fp8_operands
from kexa.train.optim import role

ROWS = 256  # of logits that exist at a time, per sequence or of the head


def scalars(step: Any) -> dict[str, float]:
    """Everything a :class:`kexa.train.Step` holds, by name, ready to log."""
    violations = {f"violation/{i}": violation(row) for i, row in enumerate(step.expert_load)}
    return {
        **step.losses,
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "tokens": step.tokens,
        "skipped": int(step.skipped),
        **violations,
        **step.figures,
        **step.evaluation,
    }


def violation(load_E: Iterable[float]) -> float:
    """Largest load over the mean load, less 1: 0 where all experts got equally many tokens."""
    load = list(load_E)
    total = sum(load)
    return max(load) * len(load) / total - 1 if total else 0.0


class Monitor:
    """Measures every ``every``-th step of a run, the first among them; none for ``every = 0``.

    ``begin`` before the forward pass, ``gradients`` after the backward pass and before clipping,
    ``end`` after the update. Micro-batches of one step are measured together. As a context it takes
    its hooks out whatever ends the run.
    """

    def __init__(self, model: nn.Module, every: int):
        self.model, self.every = model, every
        self._undo: list[Callable[[], None]] = []
        self._due = False

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def begin(self, step: int) -> None:
        """Start measuring if the step is due."""
        self._due = self.every > 0 and step % self.every == 0
        if not self._due:
            return
        self._maxima: dict[str, Tensor] = {}
        self._ratios: dict[str, list[Tensor]] = {}  # [sum, count]
        self._figures: dict[str, float] = {}
        self._roles: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._roles[role(name)].append(parameter)
        self._before = {
            r: [_local(p).detach().clone() for p in parameters]
            for r, parameters in self._roles.items()
        }
        for i, moe in enumerate(self.model.moe_layers):
            self._watch_router(str(i), moe.gate)
        for name, module in self.model.named_modules():
            self._watch(name, module)

    @torch.no_grad()
    def gradients(self) -> None:
        """Read the gradients, which hold the whole step's sum."""
        if not self._due:
            return
        for r, parameters in self._roles.items():
            grads = [_local(p.grad) for p in parameters if p.grad is not None]
            self._figures[f"grad_norm/{r}"] = float(torch.nn.utils.get_total_norm(grads))

    @torch.no_grad()
    def end(self) -> dict[str, float]:
        """Stop measuring; the figures by name, empty for a step that was not due."""
        if not self._due:
            return {}
        self._leave()
        for r, parameters in self._roles.items():
            updates = [_local(p) - old for p, old in zip(parameters, self._before[r], strict=True)]
            size = sum(update.numel() for update in updates)
            norm = float(torch.nn.utils.get_total_norm(updates))
            self._figures[f"update_rms/{r}"] = norm / math.sqrt(max(1, size))
        del self._before
        self._due = False
        means = {
            name: float(total) / max(1.0, float(n)) for name, (total, n) in self._ratios.items()
        }
        maxima = {name: float(largest) for name, largest in self._maxima.items()}
        return dict(sorted((self._figures | means | maxima).items()))

    def _leave(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _watch(self, name: str, module: nn.Module) -> None:
        layer = name.removeprefix("model.layers.").split(".")[0]
        if isinstance(module, Attention):
            self._watch_attention(layer, module)
        elif isinstance(module, Head):
            self._replace(module, "cross_entropy", self._head)
        elif isinstance(module, Linear):
            self._replace(module, "matmul", self._dense)
        elif isinstance(module, SparseMoE):
            self._replace(module, "grouped_gemm", self._experts)

    def _watch_router(self, sparse_layer: str, router: Router) -> None:
        @torch.no_grad()
        def measure(_, inputs: tuple, scores_NE: Tensor) -> None:
            p_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
            entropy = -torch.special.xlogy(p_NE, p_NE).sum()
            self._ratio(f"router_entropy/{sparse_layer}", entropy, len(scores_NE))

        self._undo.append(router.register_forward_hook(measure).remove)

    def _replace(self, module: nn.Module, attribute: str, wrap: Callable) -> None:
        """Put ``wrap(original)`` in the place of a function that a module calls."""
        own, original = attribute in module.__dict__, getattr(module, attribute)
        wrapped = wrap(original)
        if wrapped is original:
            return
        setattr(module, attribute, wrapped)
        self._undo.append(
            lambda: setattr(module, attribute, original) if own else delattr(module, attribute)
        )

    def _maximum(self, name: str, value: Tensor) -> None:
        known = self._maxima.get(name)
        self._maxima[name] = value if known is None else torch.maximum(known, value)

    def _ratio(self, name: str, total: Tensor, count: Tensor | int) -> None:
        known = self._ratios.setdefault(name, [0.0, 0])
        known[0], known[1] = known[0] + total, known[1] + count

    def _watch_attention(self, layer: str, module: Attention) -> None:
        seen: dict[str, Any] = {}

        def arrive(_, inputs: tuple) -> None:
            seen["context"], seen["operands"] = inputs[1], []

        def measure(*_) -> None:
            q, k, _v = seen["operands"]
            context: Context = seen["context"]
            largest = largest_logit(q, k, module.window, context.document_ids_BT)
            self._maximum(f"attention_logit/{layer}", largest)
            seen.clear()

        def wrap(original: Callable) -> Callable:
            def operand(x: Tensor) -> Tensor:  # queries, keys and values, in this order
                y = original(x)
                seen["operands"].append(y.detach())
                return y

            return operand

        self._replace(module, "operand", wrap)
        for hook in (
            module.register_forward_pre_hook(arrive),
            module.register_forward_hook(measure),
        ):
            self._undo.append(hook.remove)

    def _head(self, original: Callable) -> Callable:
        def cross_entropy(h_ND: Tensor, w_VD: Tensor, *rest: Any) -> Tensor:
            with torch.no_grad():
                for h in h_ND.split(ROWS):
                    z = h.float() @ w_VD.float().T
                    self._maximum("head_logit", z.amax())
                    self._ratio("head_log_z", z.logsumexp(1).sum(), len(z))
            return original(h_ND, w_VD, *rest)

        return cross_entropy

    def _dense(self, original: Callable) -> Callable:
        if fp8_operands(original, [1]) is None:
            return original

        def matmul(x: Tensor, w_FD: Tensor) -> Tensor:
            y = original(x, w_FD)
            self._operands(original, x.flatten(0, -2), w_FD, y, [x.shape[:-1].numel()])
            return y

        return matmul

    def _experts(self, original: Callable) -> Callable:
        if fp8_operands(original, [1]) is None:
            return original

        def grouped_gemm(x_ND: Tensor, w_EFD: Tensor, offsets_E: Tensor) -> Tensor:
            y = original(x_ND, w_EFD, offsets_E)
            counts = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
            self._operands(original, x_ND, w_EFD, y, counts)
            return y

        return grouped_gemm

    @torch.no_grad()
    def _operands(
        self, product: Callable, x_ND: Tensor, w: Tensor, y: Tensor, counts: list[int]
    ) -> None:
        """Measure x and w now and dy when the backward pass brings it."""
        rounded = fp8_operands(product, counts)

        def measure(which: str, value: Tensor) -> None:
            for name, to_fp8 in rounded.items():
                if name.split()[1] == which:
                    self._fp8(name, value, to_fp8(value))

        def gradient(dy: Tensor) -> None:
            with torch.no_grad():
                measure("dy", dy.flatten(0, -2))

        measure("x", x_ND.detach())
        measure("w", w.detach())
        if y.requires_grad:
            y.register_hook(gradient)

    def _fp8(self, name: str, x: Tensor, rounded: Tensor) -> None:
        if x.numel():
            self._maximum(f"fp8_amax/{name}", x.abs().amax())
        nonzero = x != 0
        self._ratio(
            f"fp8_underflow/{name}", (nonzero & (rounded == 0)).sum(), nonzero.sum().double()
        )


@torch.no_grad()
def largest_logit(
    q_BHTK: Tensor, k_BGTK: Tensor, window: int | None, document_ids_BT: Tensor | None
) -> Tensor:
    """The largest ``q . k / sqrt(K)`` of a query and a key that it sees, a scalar in fp32.

    Args:
        q_BHTK, k_BGTK: as attention reads them. window: keys that a query sees; None for all
            before it. document_ids_BT: a query sees its own document only.
    """
    (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
    q, k = q_BHTK.float().reshape(B, G, H // G, T, K), k_BGTK.float()
    at = torch.arange(T, device=q.device)
    largest = q.new_full((), float("-inf"))
    for start in range(0, T, ROWS):
        rows = slice(start, start + ROWS)
        columns = slice(0 if window is None else max(0, start - window + 1), start + ROWS)
        age = at[rows, None] - at[columns]
        seen = (age >= 0) if window is None else (age >= 0) & (age < window)
        if document_ids_BT is not None:
            same = document_ids_BT[:, rows, None] == document_ids_BT[:, None, columns]
            seen = (seen & same)[:, None, None]
        z = torch.einsum("bghtk,bgsk->bghts", q[..., rows, :], k[:, :, columns]) / math.sqrt(K)
        largest = torch.maximum(largest, z.masked_fill(~seen, float("-inf")).amax())
    return largest


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
