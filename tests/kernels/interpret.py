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
from kexa.kernels import grouped as grouped_package
from kexa.kernels.attention import reference as attention_reference
from kexa.kernels.attention import triton as attention
from kexa.kernels.decode import triton as decode
from kexa.kernels.fp8 import triton as fp8
from kexa.kernels.grouped import reference as grouped_reference
from kexa.kernels.grouped import triton as grouped
from tests.kernels import decode_checks, fp8_checks
from tests.kernels import kernel_checks as checks
from tests.kernels.mutants import FAULTS

FP32 = 1e-5


def attention_check(op: Callable, case: str) -> None:
    checks.check_attention(op, attention_reference.attention, case, torch.float32, FP32)


def grouped_check(op: Callable, case: str) -> None:
    checks.check_grouped_gemm(op, grouped_reference.grouped_gemm, case, torch.float32, FP32)


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


def bfloat16_is_refused() -> None:
    x = torch.ones(1, 2, 4, 16, dtype=torch.bfloat16)
    for call in (
        lambda: attention_package.global_attention(x, x, x),
        lambda: grouped_package.grouped_gemm(x[0, 0], x[0], torch.tensor([0, 4])),
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
        "decode": (decode, "decode_attention", decode_checks.check, decode_checks.CASES),
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
    addresses_past_two_billion,
    bfloat16_is_refused,
    dispatch_reaches_the_kernels,
    equal_bits,
    every_code,
)

if __name__ == "__main__":
    main()
