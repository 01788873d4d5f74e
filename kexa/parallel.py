"""Two independent runs side by side, each with half of the threads.

A small model keeps two threads busy for little more than half of the time, one thread for nearly
all of it. So where two runs do not depend on each other, the second is made in a process beside
this one and leaves its checkpoints, from which it is then read back:

    with beside(train, [second], runtime, seed):
        one = train(*first)
    two = train(*second)        # finished: nothing is repeated

Measured on two cores: a pair of pretraining runs takes two thirds of the time of one after the
other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch

from kexa import runtime
from kexa.config import RuntimeConfig


class BesideFailed(RuntimeError):
    """The process beside this one was ended from outside."""


@contextlib.contextmanager
def beside(
    function: Callable, calls: Sequence[tuple], config: RuntimeConfig, seed: int
) -> Iterator[None]:
    """While inside, another process makes ``function(*call)`` for every call, in order.

    Results are dropped: the function is one that leaves its work in files and finds it there.
    Inside, this process has half of ``config.threads`` and the other process the rest; leaving
    waits for it. With one thread or on a GPU, which one process fills, nothing happens here and
    the caller's own later call does the work.

    Args:
        function, calls: picklable; the function stands in a module.
        config, seed: what the other process sets itself up with, as this one did.

    Raises:
        BesideFailed: the other process was ended from outside. Its checkpoints stay.
        Exception: what ``function`` raised there, with that traceback as a note.
    """
    half = config.threads // 2
    if not half or runtime.device_of(config).type == "cuda":
        yield
        return
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    shared = dataclasses.replace(config, threads=half)
    work = pickle.dumps((function, list(calls), shared, seed))
    process = context.Process(target=_work, args=(work, sender), daemon=True)
    os.environ["TQDM_DISABLE"] = "1"  # over there: one progress bar is enough
    process.start()
    del os.environ["TQDM_DISABLE"]
    sender.close()
    torch.set_num_threads(config.threads - half)
    try:
        yield
        try:
            error = receiver.recv()
        except EOFError:
            process.join()
            error = BesideFailed(
                f"the process beside this one ended with code {process.exitcode} (-9: killed, as "
                "when memory runs out); run the stage again to go on from its checkpoints"
            )
        if error is not None:
            raise error
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        torch.set_num_threads(config.threads)


def _work(work: bytes, sender: Connection) -> None:
    """The other process. It ends with its parent, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function, calls, config, seed = pickle.loads(work)
    try:
        runtime.setup(config, seed)
        for call in calls:
            function(*call)
    except Exception as error:
        error.add_note(f"in the process beside:\n{traceback.format_exc()}")
        sender.send(error)
    else:
        sender.send(None)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
