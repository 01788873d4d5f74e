"""The commands that do not run notebooks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kexa.__main__ import main
from kexa.config import ROOT


def kexa(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kexa", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_doctor_says_what_and_why():
    done = kexa("doctor")
    assert done.returncode == 0, done.stderr
    for word in (
        "python 3",
        "torch",
        "GiB",
        "cache",
        "device",
        "compute dtype",
        "FP8",
        "threads",
        "kernels",
        "window attention: blocks",
        "experts: their own rows",
        "bf16: ",
    ):
        assert word in done.stdout


def test_the_pairs_in_the_checkout_agree(capsys):
    assert main(["notebooks", "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["run", "--only", "1", "--from", "2"], ["notebooks"]])
def test_wrong_usage_exits_with_two(arguments):
    done = kexa(*arguments)
    assert done.returncode == 2
    assert "usage: kexa" in done.stderr
