"""Run an untrusted Python program in a child process with limits on time, memory and output.

The child is a fresh interpreter in isolated mode, in an empty folder, without the parent's
environment. Before it runs the program it limits itself: CPU seconds, address space, files of at
most a megabyte, no core dumps. The parent kills its process group when the wall clock runs out.

What it does not cover: it is no security boundary. The program can read every file that the user
can read, write outside its folder, open sockets, and use the processor until its time is up; the
memory limit is per process, so several children may each use that much. Run code that you would
not run yourself in a container.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

Ending = Literal["passed", "failed", "timeout"]

_PRELUDE = """
import resource, sys
seconds, megabytes, finished = map(int, sys.argv[1:])
sys.argv[1:] = []
for what, limit in (
    (resource.RLIMIT_CPU, seconds),
    (resource.RLIMIT_AS, megabytes * 2**20),
    (resource.RLIMIT_FSIZE, 2**20),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(what, (limit, limit))
source = sys.stdin.read()
exec(compile(source, "program", "exec"), {"__name__": "__main__"})
sys.exit(finished)
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended; ``message`` is the last line it wrote to stderr.

    "passed" means that its last line was reached: a program that leaves early has failed, whatever
    its exit code.
    """

    ending: Ending
    message: str


def run_python(program: str, seconds: int = 5, megabytes: int = 512) -> Outcome:
    """Run a program to its end or its limit.

    Raises:
        ValueError: a limit below 1.
    """
    if seconds < 1 or megabytes < 1:
        raise ValueError(f"seconds={seconds}, megabytes={megabytes}: limits must be at least 1")
    finished = 2 + secrets.randbelow(120)  # an exit code that the program does not know
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _PRELUDE, str(seconds), str(megabytes), str(finished)],
            cwd=folder,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, stderr = child.communicate(program.encode("utf-8", "replace"), timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            _kill_group(child.pid)
            child.communicate()
            return Outcome("timeout", f"stopped after {seconds + 1} s")
        _kill_group(child.pid)  # what the program left running
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    if child.returncode == -signal.SIGKILL or child.returncode == -signal.SIGXCPU:
        return Outcome("timeout", f"stopped after {seconds} s of CPU time")
    return Outcome(
        "passed" if child.returncode == finished else "failed", lines[-1] if lines else ""
    )


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
