"""Run the kernels' checks under Triton's interpreter; print the outcome of each as JSON.

A program, not a test module: ``TRITON_INTERPRET=1`` must be set before Triton is imported and
cannot be taken back, so ``test_interpreter.py`` runs this once in a process of its own. The outcome
of a check is "" when it holds, else what it said.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from kexa.kernels import attention as attention_package
from kexa.kernels import cross_entropy as cross_entropy_package
from kexa.kernels import experts as experts_package
from kexa.kernels import glu as glu_package
from kexa.kernels import grouped as grouped_package
from kexa.kernels import norm as norm_package
from kexa.kernels import routing as routing_package
from kexa.kernels.attention import reference as attention_reference
from kexa.kernels.attention import triton as attention
from kexa.kernels.cross_entropy import reference as cross_entropy_reference
from kexa.kernels.cross_entropy import triton as cross_entropy
from kexa.kernels.decode import triton as decode
from kexa.kernels.experts import triton as experts
from kexa.kernels.fp8 import triton as fp8
from kexa.kernels.glu import reference as glu_reference
from kexa.kernels.glu import triton as glu
from kexa.kernels.grouped import reference as grouped_reference
from kexa.kernels.grouped import triton as grouped
from kexa.kernels.norm import reference as norm_reference
from kexa.kernels.norm import triton as norm
from kexa.kernels.routing import reference as routing_reference
from kexa.kernels.routing import triton as routing
from tests.kernels import decode_checks, experts_checks, fp8_checks, rows_checks
from tests.kernels import kernel_checks as checks
from tests.kernels.mutants import FAULTS

FP32 = 1e-5


def attention_check(op: Callable, case: str) -> None:
    sys.modules[op.__module__].BLOCK = 16  # two extents to a tile
    checks.check_attention(op, attention_reference.attention, case, torch.float32, FP32)


def grouped_check(op: Callable, case: str) -> None:
    checks.check_grouped_gemm(op, grouped_reference.grouped_gemm, case, torch.float32, FP32)


def experts_up_check(op: Callable, case: str) -> None:
    experts_checks.check_up(op, case, torch.float32, FP32)
    experts_checks.check_rounding(op, case)


def experts_down_check(op: Callable, case: str) -> None:
    experts_checks.check_down(op, case, torch.float32, FP32)
    experts_checks.check_down(op, case, torch.float16, 2e-3)


def cross_entropy_check(op: Callable, case: str) -> None:
    sys.modules[op.__module__].CHUNK = 2  # several chunks of a vocabulary quick to interpret
    plain = cross_entropy_reference.linear_cross_entropy
    checks.check_cross_entropy(op, plain, case, torch.float32, FP32)


def norm_check(op: Callable, case: str) -> None:
    op.__globals__["PROGRAMS"] = 3  # so few that small inputs give each several tiles
    rows_checks.check_rms_norm(op, norm_reference.rms_norm, case, torch.float32, FP32)


def glu_check(op: Callable, case: str) -> None:
    rows_checks.check_swiglu(op, glu_reference.swiglu, case, torch.float32, FP32)


def routing_check(op: Callable, case: str) -> None:
    op.__globals__["SCAN_TILES"] = 2  # so few that small inputs take several steps
    rows_checks.check_routing(op, case, torch.float32, FP32, lowest=True)


def attention_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (checks.fenced(generator, 1, n, 37, 5, dtype=torch.float64) for n in (2, 1, 1))
    ids = (torch.arange(37) > 9).long()[None]

    def operation(q, k, v):
        return attention.attention(q, k, v, 20, ids)

    assert torch.autograd.gradcheck(operation, (q, k, v), fast_mode=True)


def grouped_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (checks.fenced(generator, *s, dtype=torch.float64) for s in ((70, 35), (3, 66, 35)))
    ends = torch.tensor([1, 1, 70], dtype=torch.int32)

    def operation(x, w):
        return grouped.grouped_gemm(x, w, ends)

    assert torch.autograd.gradcheck(operation, (x, w), fast_mode=True)


def experts_gradcheck() -> None:
    x, w_up, routing, _ = experts_checks.up_inputs("every expert", torch.float64)
    h, w_down, _, _ = experts_checks.down_inputs("every expert", torch.float64)

    def down(h, w, gates):
        return experts.expert_down(h, w, routing._replace(gates_NK=gates))

    def up(x, w):
        return experts.expert_up(x, w, routing)

    assert torch.autograd.gradcheck(up, (x, w_up), fast_mode=True)
    assert torch.autograd.gradcheck(down, (h, w_down, routing.gates_NK), fast_mode=True)


def experts_repeat_their_bits() -> None:
    x, w_up, routing, _ = experts_checks.up_inputs("empty and full experts", torch.float32)
    _, w_down, _, dy = experts_checks.down_inputs("empty and full experts", torch.float32)
    leaves = (x, w_up, w_down, routing.gates_NK)

    def run() -> tuple[torch.Tensor, ...]:
        y = experts.expert_down(experts.expert_up(x, w_up, routing), w_down, routing)
        return (y, *torch.autograd.grad(y, leaves, dy))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def experts_keep_nothing_without_a_gradient() -> None:
    """Gate and up are written for the backward pass alone."""
    x, w, routing, _ = experts_checks.up_inputs("every expert", torch.float32)
    written = []
    launch = experts.up_launch

    def seen(x, w, order, offsets, gate_up, h, top_k):
        written.append(gate_up)
        return launch(x, w, order, offsets, gate_up, h, top_k)

    experts.up_launch = seen
    experts.expert_up(x, w, routing)
    experts.expert_up(x.detach(), w.detach(), routing)
    with torch.no_grad():
        experts.expert_up(x, w, routing)
    experts.up_launch = launch
    assert [gate_up is None for gate_up in written] == [False, True, True]


def cross_entropy_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    h, w = (checks.fenced(generator, n, 5, dtype=torch.float64) for n in (5, 70))
    targets = torch.randint(0, 70, (5,), generator=generator)

    def operation(h, w):
        return cross_entropy.linear_cross_entropy(h, w, targets)

    assert torch.autograd.gradcheck(operation, (h, w), fast_mode=True)


def frozen_inputs_get_no_gradient() -> None:
    h, w, targets = checks.cross_entropy_inputs("ragged everywhere", torch.float32)
    full = torch.autograd.grad(cross_entropy.linear_cross_entropy(h, w, targets), (h, w))
    for leaves, i in (((h, w.detach()), 0), ((h.detach(), w), 1)):
        loss = cross_entropy.linear_cross_entropy(*leaves, targets)
        (gradient,) = torch.autograd.grad(loss, leaves[i])
        assert torch.equal(gradient, full[i])
        assert loss.grad_fn.next_functions[1 - i][0] is None


def rows_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (checks.fenced(generator, *s, dtype=torch.float64) for s in ((33, 21), (21,)))
    gate, up = (checks.fenced(generator, 33, 21, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w: norm.rms_norm(x, w, 0.1), (x, w), fast_mode=True)
    assert torch.autograd.gradcheck(glu.swiglu, (gate, up), fast_mode=True)
    for normalise in (True, False):

        def gates(scores, normalise=normalise):
            return routing.route(scores, up, 3, normalise, 2.5)[1]

        scores = gate.detach().sigmoid().requires_grad_()
        assert torch.autograd.gradcheck(gates, (scores,), fast_mode=True)


def nan_is_routed_and_shows() -> None:
    """A token of NaN and an expert of NaN: places stay a permutation, the gates are NaN."""
    scores = torch.rand(70, 100)
    scores[3], scores[:, 90] = torch.nan, torch.nan
    chosen, gates, order, inverse, offsets = routing.route(scores, scores, 4, True, 1.0)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    assert bool((chosen == 90).any(1)[torch.arange(70) != 3].all()) and bool(gates.isnan().all())
    assert sorted(order.tolist()) == list(range(280)) and int(offsets[-1]) == 280
    assert torch.equal(order[inverse], torch.arange(280))


def addresses_past_two_billion() -> None:
    """Three experts 2**30 numbers apart, on a sparse file: the last begins where int32 ends."""
    with tempfile.NamedTemporaryFile() as file:
        apart, (F, D) = 2**30, (16, 16)
        stack = np.memmap(file.name, dtype=np.float16, mode="w+", shape=(2 * apart + F * D,))
        stack[2 * apart :] = np.arange(F * D) % 7
        w = torch.from_numpy(stack).as_strided((3, F, D), (apart, D, 1))
        x, y = torch.ones(2, D, dtype=torch.float16), torch.empty(2, F, dtype=torch.float16)
        ends = torch.tensor([0, 0, 2], dtype=torch.int32)
        grouped.rows_launch(x, w, ends, y, transpose=False).run()
        checks.assert_close({"output": (y, x.float() @ w[2].float().T)}, 1e-3, "far expert")
        order, pairs = torch.tensor([1, 0]), torch.empty(2, F, dtype=torch.float16)
        experts.scatter_launch(x, w, None, order, ends, pairs, transpose=False).run()
        checks.assert_close({"output": (pairs, y)}, 1e-3, "far expert, scattered")
        h = torch.empty(2, F // 2, dtype=torch.float16)
        experts.up_launch(x / 64, w, order, ends, None, h, top_k=1).run()
        gate, up = (y.float() / 64).chunk(2, dim=-1)
        checks.assert_close({"h": (h, gate.sigmoid() * gate * up)}, 2e-3, "far expert, up")


def bfloat16_is_refused() -> None:
    x = torch.ones(1, 2, 4, 16, dtype=torch.bfloat16)
    routing = experts_package.Routing(*routing_reference.route(*torch.rand(2, 4, 2), 2, True, 1.0))
    for call in (
        lambda: attention_package.global_attention(x, x, x),
        lambda: grouped_package.grouped_gemm(x[0, 0], x[0], torch.tensor([0, 4])),
        lambda: experts_package.expert_up(x[0, 0], x[0], routing),
        lambda: experts_package.expert_down(x[0].flatten(0, 1), x[0], routing),
        lambda: cross_entropy_package.linear_cross_entropy(
            x[0, 0], x[0, 0], torch.tensor([0, 1, 2, 3])
        ),
        lambda: norm_package.rms_norm(x, x[0, 0, 0], 1e-5),
        lambda: glu_package.swiglu(x, x),
        lambda: routing_package.route(x[0, 0], x[0, 0], 2, True, 1.0),
    ):
        try:
            call()
        except ValueError as error:
            assert "bfloat16" in str(error)
        else:
            raise AssertionError("bfloat16 went to the interpreter")


def dispatch_reaches_the_kernels() -> None:
    q, k, v, window, ids, _ = checks.attention_inputs("window over two tiles", torch.float32)
    through = attention_package.window_attention(q, k, v, window, ids)
    assert through.grad_fn.name() == "_AttentionBackward"
    x, w, ends, _ = checks.grouped_inputs("ragged over tiles", torch.float32)
    assert grouped_package.grouped_gemm(x, w, ends).grad_fn.name() == "_GroupedGemmBackward"
    x, w, routed, _ = experts_checks.up_inputs("every expert", torch.float32)
    assert experts_package.expert_up(x, w, routed).grad_fn.name() == "_ExpertUpBackward"
    h, w, routed, _ = experts_checks.down_inputs("every expert", torch.float32)
    assert "_ExpertDownBackward" in ancestors(experts_package.expert_down(h, w, routed))
    h, w, targets = checks.cross_entropy_inputs("one row, few words", torch.float32)
    loss = cross_entropy_package.linear_cross_entropy(h, w, targets)
    assert loss.grad_fn.saved_tensors[-1].shape == (1,)  # log-sum-exps; the PyTorch path saves none
    x, w, _ = rows_checks.norm_inputs("odd rows and features", torch.float32)
    assert "_RMSNormBackward" in ancestors(norm_package.rms_norm(x, w, 1e-5))
    assert "_SwiGLUBackward" in ancestors(glu_package.swiglu(x, x))
    assert "_RouteBackward" in ancestors(routing_package.route(x, x, 2, True, 1.0).gates_NK)


def ancestors(out: torch.Tensor) -> set[str]:
    """Names of the nodes that a gradient of ``out`` passes."""
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [parent for parent, _ in node.next_functions if parent]
    return names


def every_code() -> None:
    """All finite codes, the midpoints between them and their neighbours, in tiles of scale 1."""
    values = torch.from_numpy(fp8_checks.GRID).float()
    middle = (values[1:] + values[:-1]) / 2
    around = [values, middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)]
    values = torch.cat([*around, *(-v for v in around)])
    x = torch.full((len(values), 2), 448.0)
    x[:, 0] = values
    fp8_checks.assert_same_bits(fp8.quantize_rows(x), fp8_checks.rows_by_tiles(x), "every code")


def equal_bits() -> None:
    q, k, v, window, ids, d_out = checks.attention_inputs("window over two tiles", torch.float32)
    first, second = (
        torch.autograd.grad(attention.attention(q, k, v, window, ids), (q, k, v), d_out)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    h, w, targets = checks.cross_entropy_inputs("many rows", torch.float32)
    first, second = (
        torch.autograd.grad(cross_entropy.linear_cross_entropy(h, w, targets), (h, w))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def mutated(module: ModuleType, old: str, new: str, directory: Path) -> ModuleType:
    """The module with one fault, loaded from a file because Triton reads kernels' source."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert old in source, f"fault {old!r} is not in {module.__name__}: update the list of faults"
    path = directory / f"mutant_{len(list(directory.iterdir()))}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def outcome(check: Callable, *arguments) -> str:
    try:
        check(*arguments)
    except AssertionError as error:
        return str(error) or "assertion failed"
    return ""


def first_failure(check: Callable, op: Callable, cases: dict) -> str:
    return next(filter(None, (outcome(check, op, case) for case in cases)), "")


def main() -> None:
    checks.poison_outputs()
    operations = {
        "attention": (attention, "attention", attention_check, checks.ATTENTION_CASES),
        "grouped": (grouped, "grouped_gemm", grouped_check, checks.GROUPED_CASES),
        "experts up": (experts, "expert_up", experts_up_check, experts_checks.CASES),
        "experts down": (experts, "expert_down", experts_down_check, experts_checks.CASES),
        "decode": (decode, "decode_attention", decode_checks.check, decode_checks.CASES),
        "cross entropy": (
            cross_entropy,
            "linear_cross_entropy",
            cross_entropy_check,
            checks.CROSS_ENTROPY_CASES,
        ),
        "norm": (norm, "rms_norm", norm_check, rows_checks.NORM_CASES),
        "glu": (glu, "swiglu", glu_check, rows_checks.GLU_CASES),
        "routing": (routing, "route", routing_check, rows_checks.ROUTING_CASES),
    }
    for name, (function, check) in fp8_checks.OPERATIONS.items():
        operations[name] = (fp8, function, check, fp8_checks.CASES)
    report: dict[str, dict[str, str]] = {"checks": {}, "faults": {}}
    with np.errstate(invalid="raise", divide="raise", over="raise"):
        for name, (module, function, check, cases) in operations.items():
            for case in cases:
                result = outcome(check, getattr(module, function), case)
                report["checks"][f"{name}: {case}"] = result
        for check in SINGLE_CHECKS:
            report["checks"][check.__name__] = outcome(check)
    with tempfile.TemporaryDirectory() as directory, np.errstate(all="ignore"):
        for name, (module, function, check, cases) in operations.items():
            for fault, (old, new) in FAULTS[name].items():
                mutant = mutated(module, old, new, Path(directory))
                caught = first_failure(check, getattr(mutant, function), cases)
                report["faults"][f"{name}: {fault}"] = caught
    json.dump(report, sys.stdout)


SINGLE_CHECKS = (
    attention_gradcheck,
    grouped_gradcheck,
    experts_gradcheck,
    experts_repeat_their_bits,
    experts_keep_nothing_without_a_gradient,
    cross_entropy_gradcheck,
    frozen_inputs_get_no_gradient,
    addresses_past_two_billion,
    bfloat16_is_refused,
    dispatch_reaches_the_kernels,
    equal_bits,
    every_code,
    rows_gradcheck,
    nan_is_routed_and_shows,
)

if __name__ == "__main__":
    main()
