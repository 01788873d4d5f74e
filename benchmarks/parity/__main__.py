"""The runner: all cases of all seeds, or one again. What fails is named so that it can be."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from tqdm.auto import tqdm

from benchmarks.__main__ import RESULTS
from benchmarks.parity import cases
from benchmarks.parity.configs import all_in_fp64, random_config
from kexa.record import write_atomic

CONFIGS = 200


@dataclass(frozen=True)
class Kind:
    """What is compared, how closely it has to agree, and under which numerics."""

    cases: Callable[[int], cases.Cases]
    tolerance: float
    numerics: Callable[[], AbstractContextManager] = all_in_fp64


def against_transformers(dtype: torch.dtype, tolerance: float) -> Kind:
    return Kind(partial(cases.transformers_cases, dtype=dtype), tolerance, nullcontext)


KINDS = {
    "transformers-fp32": against_transformers(torch.float32, 1e-4),
    "transformers-fp64": against_transformers(torch.float64, 1e-9),
    "packed": Kind(cases.packed_cases, 1e-10),
    "prefill": Kind(cases.prefill_cases, 1e-10),
    "decode": Kind(cases.decode_cases, 1e-10),
    "mtp": Kind(cases.mtp_cases, 1e-10),
}


def errors(kind: str, seed: int, case: str | None = None) -> dict[str, float]:
    """The error of each case of one kind and seed, or only of the one that is named."""
    with torch.no_grad(), KINDS[kind].numerics():
        found = KINDS[kind].cases(seed)
        return {name: compare() for name, compare in found if case in (None, name)}


def failed(kind: str, error: float) -> bool:
    """Whether it is too large; NaN is."""
    return not error <= KINDS[kind].tolerance


def results(seeds: range) -> dict:
    """All cases of the seeds in numbers, and the failures one by one."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    failures = []
    for seed in tqdm(seeds, desc="configs"):
        for kind in KINDS:
            for case, error in errors(kind, seed).items():
                found[kind].append(error)
                if failed(kind, error):
                    failures.append({"kind": kind, "seed": seed, "case": case, "error": error})
    return {
        "configs": len(seeds),
        "cases": sum(map(len, found.values())),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kinds": {
            kind: {
                "cases": len(measured),
                "tolerance": KINDS[kind].tolerance,
                "worst": float(f"{cases.largest(measured):.1e}"),
            }
            for kind, measured in found.items()
        },
        "failures": [
            {**failure, "config": dataclasses.asdict(random_config(failure["seed"]))}
            for failure in failures
        ],
    }


def repeat(seed: int, kinds: list[str], case: str | None) -> int:
    """Print the cases of one seed; 1 if one fails."""
    print(random_config(seed))
    found = [(kind, *item) for kind in kinds for item in errors(kind, seed, case).items()]
    if case and not found:
        raise ValueError(f"seed {seed} has no case {case!r}; leave --case out to see those it has")
    for kind, name, error in found:
        print(f"{kind}: {name}: {error:.1e}{' FAILED' if failed(kind, error) else ''}")
    return int(any(failed(kind, error) for kind, _, error in found))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description="Parity over random configs."
    )
    parser.add_argument("--seed", type=int, help="one config: print its cases, write nothing")
    parser.add_argument("--kind", choices=KINDS, help="with --seed: one kind")
    parser.add_argument("--case", help="with --seed: the case of this name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small only lose by sharing work
    transformers.logging.disable_progress_bar()
    if arguments.seed is not None:
        kinds = [arguments.kind] if arguments.kind else list(KINDS)
        return repeat(arguments.seed, kinds, arguments.case)
    if arguments.kind or arguments.case:
        parser.error("--kind and --case need --seed")
    found = results(range(CONFIGS))
    write_atomic(RESULTS / "parity.json", json.dumps(found, indent=1) + "\n")
    for kind, row in found["kinds"].items():
        print(f"{kind}: {row['cases']} cases, worst {row['worst']}, allowed {row['tolerance']}")
    for failure in found["failures"]:
        again = f"--seed {failure['seed']} --kind {failure['kind']} "
        again += f"--case {shlex.quote(failure['case'])}"
        print(f"{failure['error']:.1e}: python -m benchmarks.parity {again}")
    return int(bool(found["failures"]))


if __name__ == "__main__":
    sys.exit(main())
