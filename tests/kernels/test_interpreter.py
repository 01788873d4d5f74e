"""The Triton kernels without a GPU: interpreted against the references, with planted faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kexa.config import ROOT
from tests.kernels import decode_checks, experts_checks, fp8_checks, rows_checks
from tests.kernels.kernel_checks import ATTENTION_CASES, CROSS_ENTROPY_CASES, GROUPED_CASES
from tests.kernels.mutants import FAULTS

CASES = [f"attention: {case}" for case in ATTENTION_CASES]
CASES += [f"grouped: {case}" for case in GROUPED_CASES]
CASES += [f"cross entropy: {case}" for case in CROSS_ENTROPY_CASES]
CASES += ["cross_entropy_gradcheck", "frozen_inputs_get_no_gradient"]
CASES += ["attention_gradcheck", "grouped_gradcheck", "addresses_past_two_billion"]
CASES += ["bfloat16_is_refused", "dispatch_reaches_the_kernels", "equal_bits"]
CASES += [f"{name}: {case}" for name in fp8_checks.OPERATIONS for case in fp8_checks.CASES]
CASES += [f"decode: {case}" for case in decode_checks.CASES]
CASES += ["every_code"]
CASES += [f"norm: {case}" for case in rows_checks.NORM_CASES]
CASES += [f"glu: {case}" for case in rows_checks.GLU_CASES]
CASES += [f"routing: {case}" for case in rows_checks.ROUTING_CASES]
CASES += [f"experts {way}: {case}" for way in ("up", "down") for case in experts_checks.CASES]
CASES += ["experts_gradcheck", "experts_repeat_their_bits"]
CASES += ["experts_keep_nothing_without_a_gradient"]
CASES += ["rows_gradcheck", "nan_is_routed_and_shows"]

FAULT_NAMES = [f"{op}: {name}" for op, faults in FAULTS.items() for name in faults]


@pytest.fixture(scope="session")
def report() -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpret"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_its_reference(report, case):
    assert report["checks"][case] == ""


@pytest.mark.parametrize("fault", FAULT_NAMES)
def test_planted_fault_is_caught(report, fault):
    assert report["faults"][fault] != ""


def test_no_check_is_left_out(report):
    assert set(report["checks"]) == set(CASES)
