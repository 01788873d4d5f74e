"""The runner: correctness first, then interleaved rounds, then a ratio with its spread.

For each shape every candidate runs once per round, in turn, so that a slow minute of the machine
slows all of them. A round gives one ratio rival / kexa; reported are the median and the middle 80%
of the rounds. An operation whose check is red gets no ratio; a rival that runs out of memory or is
not installed is named as such. In a round a candidate repeats until it has run for 10 ms; a GPU
reads its own clock, between events, so that launches of repeats overlap.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.registry import OPERATIONS, Operation, Shape
from kexa.kernels.check import check
from kexa.record import commit, write_atomic

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 15
SAMPLE = 0.01  # seconds that a candidate runs in a round, at least


def measure(operation: Operation, shape: Shape, device: str, rounds: int = ROUNDS) -> dict:
    """Seconds of every candidate and the ratio to ours, over interleaved rounds."""
    candidates = operation.build(shape, device)
    seconds: dict[str, list[float]] = {}
    repeats, absent = {}, {}
    for name, run in candidates.items():
        if run is None:
            absent[name] = "not installed"
            continue
        try:
            for _ in range(2):  # the first compiles and warms caches
                once = _seconds(run, device, 1)
        except torch.OutOfMemoryError:
            absent[name] = "out of memory"
            continue
        seconds[name], repeats[name] = [], max(1, math.ceil(SAMPLE / once))
    for _ in tqdm(range(rounds), desc=f"{operation.name} {shape}", leave=False):
        for name in seconds:
            seconds[name].append(_seconds(candidates[name], device, repeats[name]))
    ours = seconds["kexa"]
    return {
        "operation": operation.name,
        "shape": shape,
        "milliseconds": {n: round(1e3 * statistics.median(s), 3) for n, s in seconds.items()},
        "ratio": {
            name: spread([rival / our for rival, our in zip(s, ours, strict=True)])
            for name, s in seconds.items()
            if name != "kexa"
        },
        "absent": absent,
    }


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and the middle 80%."""
    ordered = sorted(ratios)
    cut = len(ordered) // 10
    low, high = ordered[cut], ordered[-1 - cut]
    values = {"median": statistics.median(ordered), "low": low, "high": high}
    return {name: round(value, 3) for name, value in values.items()}


def results(
    device: str, operations: tuple[Operation, ...] = OPERATIONS, rounds: int = ROUNDS
) -> dict:
    """Check, then measure, every operation; a red check is recorded instead of times."""
    rows = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for operation in operations:
        checked = check(operation.check, device, dtype)
        print(checked)
        if not checked.holds:
            rows.append({"operation": operation.name, "red": str(checked)})
            continue
        for shape in operation.cuda if device == "cuda" else operation.cpu:
            row = measure(operation, shape, device, rounds)
            print(" ", shape, row["milliseconds"], row["absent"] or "")
            rows.append({**row, "path": checked.path})
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "rows": rows,
    }


def table(found: dict) -> str:
    """The results as Markdown; forward and backward together."""
    lines = [
        f"# {found['device']}",
        "",
        f"Measured here: forward and backward, {found['dtype']}, {found['threads']} threads, torch "
        f"{found['torch']}, commit {found['commit']}, {found['rounds']} interleaved rounds. Ratio: "
        "time of the rival over ours, median (middle 80% of rounds); above 1 ours is faster.",
        "",
        "| operation | shape | candidate | ms | rival / kexa |",
        "|---|---|---|--:|--:|",
    ]
    for row in found["rows"]:
        if "red" in row:
            lines.append(f"| {row['operation']} | | not measured: {row['red']} | | |")
            continue
        shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
        for name, milliseconds in row["milliseconds"].items():
            ratio = row["ratio"].get(name)
            said = (
                f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio else ""
            )
            label = f"**kexa** ({row['path']})" if name == "kexa" else name
            lines.append(
                f"| {row['operation']} | {shape} | {label} | {milliseconds:.3f} | {said} |"
            )
        for name, why in row["absent"].items():
            lines.append(f"| {row['operation']} | {shape} | {name} | {why} | |")
    return "\n".join(lines) + "\n"


def compile_ahead() -> dict:
    """What every kernel needs on sm_90 and sm_100 at the published shapes."""
    import triton

    from kexa.kernels import aot

    rows = []
    for name, launch in tqdm(list(aot.published_launches()), desc="compiling"):
        for capability in aot.TENSOR_CORE:
            compiled = aot.compile_for(launch, capability)
            rows.append({"operation": name, **dataclasses.asdict(compiled)})
    return {"triton": triton.__version__, "rows": rows}


def device_name(device: str) -> str:
    """What the results are filed under."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()} {os.cpu_count()} cores"


def results_of(name: str) -> Path:
    """Where the results of a device of this name lie."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Kernel benchmarks.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--aot", action="store_true", help="compile for chips that are not here")
    parser.add_argument("--only", nargs="+", metavar="OPERATION", help="print these, write nothing")
    arguments = parser.parse_args()
    if arguments.aot:
        write_atomic(RESULTS / "aot.json", json.dumps(compile_ahead(), indent=1) + "\n")
        return 0
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU here; use --device cpu")
    if arguments.only:
        unknown = set(arguments.only) - {operation.name for operation in OPERATIONS}
        if unknown:
            names = ", ".join(operation.name for operation in OPERATIONS)
            parser.error(f"--only {sorted(unknown)[0]!r}: use some of {names}")
        some = tuple(o for o in OPERATIONS if o.name in arguments.only)
        print(table(results(device, some)))
        return 0
    found = results(device)
    folder = results_of(found["device"])
    write_atomic(folder / "kernels.json", json.dumps(found, indent=1) + "\n")
    write_atomic(folder / "kernels.md", table(found))
    print(table(found))
    return 1 if any("red" in row for row in found["rows"]) else 0


def _seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Mean seconds of one call."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    sys.exit(main())
