"""The planner's memory against the allocator: the peak of one training step, config by config.

python -m benchmarks.memory                     on the CPU
python -m benchmarks.memory --device cuda       the planner's other column; not run on a GPU so far

    states       bytes of parameters, buffers, optimizer states and the batch before the step
    peak         states and the largest sum of live allocations during the step: forward, backward,
                 both optimizers; on the CPU as PyTorch's profiler records them, on a GPU as its
                 allocator does. Scratch space of the libraries beneath PyTorch is not among it, the
                 interpreter is not either
    predicted    :func:`kexa.train.memory.memory` for the same config

The step measured is the second, when the optimizers have their states. Configs differ in depth,
width, experts, vocabulary, rows, length, numerics, accumulation and recomputation; a GPU, whose
allocator hands out multiples of 512 bytes, gets ``WIDER`` times the rows. One process: what
sharding adds is not measured here. Exits with 1 if a prediction is off by more than 10%.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.__main__ import device_name, results_of
from kexa.config import ModelConfig
from kexa.model import KexaForCausalLM, set_recompute
from kexa.record import commit, write_atomic
from kexa.train import build_optimizers, set_numerics
from kexa.train.memory import memory
from kexa.train.operations import Work

BASE = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    intermediate_size=160,
    moe_intermediate_size=40,
    num_experts=8,
    num_experts_per_tok=2,
    sliding_window=32,
)
TOLERANCE = 0.10
WIDER = 16


@dataclass(frozen=True)
class Case:
    """One step to predict and to measure."""

    name: str
    config: ModelConfig
    work: Work
    accumulate: int = 1


def case(name: str, rows: int, length: int, numerics: str, accumulate: int = 1,
         recompute: bool = False, **model: Any) -> Case:  # fmt: skip
    """A case whose model differs from ``BASE`` in these keys."""
    # layer_types was derived from the base's depth
    config = replace(BASE, layer_types=(), **model)
    return Case(name, config, Work(rows, length, numerics, "cpu", recompute), accumulate)


CASES = (
    case("small", 2, 512, "fp32"),
    case("many rows", 8, 256, "fp8", num_nextn_predict_layers=1),
    case("long row", 1, 2048, "fp32", sliding_window=128, num_nextn_predict_layers=1),
    case("deep and wide", 4, 256, "fp8", num_hidden_layers=8, hidden_size=128, vocab_size=6144),
    case("many experts", 4, 256, "bf16", num_experts=32, num_experts_per_tok=4),
    case("dense", 4, 500, "fp32", first_k_dense_replace=4, intermediate_size=512),
    case("wide vocabulary", 2, 256, "bf16", vocab_size=16_000),
    case("few tokens", 1, 64, "fp32", num_experts=64, moe_intermediate_size=96, hidden_size=192),
    case("accumulated", 2, 512, "fp8", accumulate=3, tie_word_embeddings=True),
    case("recomputed", 8, 512, "fp32", recompute=True, num_hidden_layers=8),
)


def measured(what: Case) -> tuple[int, int]:
    """Bytes of the states and of the peak of a step, on the device of ``what.work``."""
    torch.manual_seed(0)
    config, work = what.config, what.work
    model = KexaForCausalLM(config).to(work.device)
    set_numerics(model, work.numerics)
    set_recompute(model, work.recompute)
    optimizers = build_optimizers(model, SimpleNamespace(learning_rate=1e-3, weight_decay=0.1))
    batch = (
        torch.randint(config.vocab_size, (work.rows, work.length), device=work.device),
        torch.zeros(work.rows, work.length, dtype=torch.int64, device=work.device),
    )

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        for _ in range(what.accumulate):
            (model.loss(*batch).total / what.accumulate).backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    kept = [*model.parameters(), *model.buffers(), *batch]
    kept += [t for o in optimizers for s in o.state.values() for t in s.values() if t.dim()]
    states = sum(t.untyped_storage().nbytes() for t in kept)
    return states, states + (_cuda_peak if work.kernels else _cpu_peak)(step)


def _cpu_peak(step: Callable[[], None]) -> int:
    """Most bytes that are live at once during a step, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _cuda_peak(step: Callable[[], None]) -> int:
    """The same of the GPU's allocator."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def compare(what: Case) -> dict[str, Any]:
    """One line of the results."""
    states, peak = measured(what)
    predicted = memory(what.config, what.work, what.accumulate)
    work = what.work
    return {
        "case": what.name,
        "parameters": round(predicted.parameters / 4),
        "rows": work.rows,
        "length": work.length,
        "numerics": work.numerics,
        "accumulate": what.accumulate,
        "recompute": work.recompute,
        "states_bytes": states,
        "peak_bytes": peak,
        "predicted_bytes": round(predicted.peak),
        "error": round(predicted.peak / peak - 1, 4),
        "error_beyond_states": round((predicted.peak - predicted.states) / (peak - states) - 1, 4),
        "at": predicted.where,
    }


def main() -> int:
    """Measure all cases and write ``memory.json`` among the results of the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU here; use --device cpu")
    lines = []
    for what in CASES:
        if device == "cuda":
            what = replace(
                what, work=replace(what.work, rows=WIDER * what.work.rows, device=device)
            )
        line = compare(what)
        lines.append(line)
        print(
            f"{line['case']:<16} {line['peak_bytes'] / 1e6:8.1f} MB measured "
            f"{line['predicted_bytes'] / 1e6:8.1f} predicted {line['error']:+7.1%}  {line['at']}"
        )
    found = {"device": device_name(device), "torch": torch.__version__, "commit": commit()}
    file = results_of(found["device"]) / "memory.json"
    write_atomic(file, json.dumps(found | {"cases": lines}, indent=1) + "\n")
    return int(any(abs(line["error"]) > TOLERANCE for line in lines))


if __name__ == "__main__":
    sys.exit(main())
