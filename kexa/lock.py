"""One writer per stage directory, however the writers die.

    .locks/NN_name          locked by its owner: the runner, or a notebook started by hand
    .locks/NN_name.kernel   the kernel that works under the lock, for the next owner

The system drops a file lock when its process ends, ``kill -9`` included, so a lock is never stale.
The kernel of a killed runner may live on for a moment: the next owner ends it by its process id and
start time, and one that has not registered yet presents a token that is no longer the lock's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil

from kexa.record import write_atomic


class Busy(Exception):
    """Another process is writing this stage."""


@contextlib.contextmanager
def hold(out: Path, stage: str) -> Iterator[str]:
    """Own a stage's directory; yields the token that its kernel has to present.

    Raises:
        Busy: the stage has a living owner.
    """
    path = out / ".locks" / stage
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = json.loads(file.read() or "{}").get("pid", "unknown")
            raise Busy(
                f"{stage} in {out.name} is being written by process {owner}: wait for it, close "
                "that notebook, or choose another output directory"
            ) from None
        _end_kernel(path.with_suffix(".kernel"))
        token = secrets.token_hex(8)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "token": token}))
        file.flush()
        yield token


def register(out: Path, stage: str, token: str) -> None:
    """Called by a kernel before it writes anything.

    Raises:
        Busy: the runner that started this kernel no longer owns the stage.
    """
    path = out / ".locks" / stage
    owner = json.loads(path.read_text(encoding="utf-8") or "{}") if path.is_file() else {}
    if owner.get("token") != token:
        raise Busy(f"the run that started this kernel no longer owns {stage}: nothing was written")
    me = {"pid": os.getpid(), "created": psutil.Process().create_time()}
    write_atomic(path.with_suffix(".kernel"), json.dumps(me))


def _end_kernel(path: Path) -> None:
    if not path.is_file():
        return
    kernel = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(kernel["pid"])
        same = abs(process.create_time() - kernel["created"]) < 5  # the clock may have been set
        if same and process.pid != os.getpid():
            family = [process, *process.children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=10)
