"""Several processes of this machine: two runs side by side, or one run spread over ranks.

A small model keeps two threads busy for little more than half of the time, one thread for nearly
all of it. So where two runs do not depend on each other, the second is made in a process beside
this one and leaves its checkpoints, from which it is then read back:

    with beside(train, [second], runtime, seed):
        one = train(*first)
    two = train(*second)        # finished: nothing is repeated

Measured on two cores: a pair of pretraining runs takes two thirds of the time of one after the
other.

A run that has no pair is spread over as many ranks (:mod:`kexa.dist`), each with its share of the
threads, and read back likewise:

    across(processes, train, (run,), runtime, seed)
    one = train(run, device)    # finished: nothing is repeated

Measured on two cores, both busy with other work: two ranks of one thread take half of the time of
one process with two threads.

SIGTERM goes to the other processes first and to this one when they have ended, at the latest 25
seconds later: a run that saves on the signal (:func:`kexa.train.fit`) has then done so in each.
Killed, this process takes the others with it at once; their last checkpoints stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch

from kexa import dist, runtime
from kexa.config import ConfigError, RuntimeConfig

GRACE = 25.0  # schedulers kill 30 seconds after SIGTERM


class BesideFailed(RuntimeError):
    """The process beside this one was ended from outside."""


@contextlib.contextmanager
def beside(
    function: Callable, calls: Sequence[tuple], config: RuntimeConfig, seed: int
) -> Iterator[None]:
    """While inside, another process makes ``function(*call)`` for every call, in order.

    Results are dropped: the function is one that leaves its work in files and finds it there.
    Inside, this process has half of ``config.threads`` and the other process the rest; leaving
    waits for it. Without calls, with one thread, or on a GPU, which one process fills, nothing
    happens here and the caller's own later calls do the work.

    Args:
        function, calls: picklable; the function stands in a module.
        config, seed: what the other process sets itself up with, as this one did.

    Raises:
        BesideFailed: the other process was ended from outside. Its checkpoints stay.
        Exception: what ``function`` raised there, with that traceback as a note.
    """
    half = config.threads // 2
    if not half or not calls or runtime.device_of(config).type == "cuda":
        yield
        return
    shared = dataclasses.replace(config, threads=half)
    # over there without a progress bar: one is enough
    process, receiver = _start(_calls, (function, list(calls), shared, seed), {"TQDM_DISABLE": "1"})
    torch.set_num_threads(config.threads - half)
    try:
        with _sigterm_first_to([process]):
            yield
        if (error := _outcome(process, receiver)) is not None:
            raise error
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        torch.set_num_threads(config.threads)


def across(
    processes: int, function: Callable, arguments: tuple, config: RuntimeConfig, seed: int
) -> None:
    """``function(*arguments, device, layout)`` on each rank of a mesh of this machine's processes.

    Results are dropped, as in :func:`beside`. With one process nothing happens here and the
    caller's own later call does the work.

    Args:
        processes: the mesh is ``processes x 1``: every rank reads rows of its own, parameters are
            sliced over all. On a GPU machine each has a GPU of its own.
        function, arguments, config, seed: as in :func:`beside`; ``config.threads`` are divided.

    Raises:
        ConfigError: fewer GPUs than processes.
        BesideFailed: a rank was ended from outside. The checkpoints stay.
        Exception: what ``function`` raised on a rank, with that traceback as a note.
    """
    if processes == 1:
        return
    device = runtime.device_of(config)
    if device.type == "cuda" and torch.cuda.device_count() < processes:
        raise ConfigError(
            f"{processes} processes need a GPU each but torch sees {torch.cuda.device_count()}: "
            "set pretrain.processes to no more"
        )
    shared = dataclasses.replace(config, threads=max(1, config.threads // processes))
    with dist.meeting_place() as meeting:
        meeting |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        _wait_for(
            [
                _start(
                    _as_rank,
                    (function, arguments, shared, seed),
                    meeting | {"RANK": rank, "LOCAL_RANK": rank},
                )
                for rank in map(str, range(processes))
            ]
        )


def _wait_for(ranks: Sequence[tuple[multiprocessing.Process, Connection]]) -> None:
    """Until all have ended. The first fault ends the others and is raised."""
    waiting = {receiver: process for process, receiver in ranks}
    try:
        with _sigterm_first_to(list(waiting.values())):
            while waiting:
                for receiver in wait(list(waiting)):
                    if (error := _outcome(waiting.pop(receiver), receiver)) is not None:
                        raise error
    except BaseException:
        for process, _ in ranks:
            process.kill()
        raise
    finally:
        for process, _ in ranks:
            process.join()


def _start(
    target: Callable, call: tuple, environment: dict[str, str]
) -> tuple[multiprocessing.Process, Connection]:
    """A process that calls ``target(*call)``, with more environment, and where it will answer."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    work = pickle.dumps((target, call))
    process = context.Process(target=_work, args=(work, sender), daemon=True)
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    process.start()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    sender.close()
    return process, receiver


def _outcome(process: multiprocessing.Process, receiver: Connection) -> Exception | None:
    """Wait for a process's end: None, what it raised, or that it was ended from outside."""
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return BesideFailed(
            f"a process beside this one ended with code {process.exitcode} (-9: killed, as when "
            "memory runs out); run the stage again to go on from its checkpoints"
        )


@contextlib.contextmanager
def _sigterm_first_to(processes: Sequence[multiprocessing.Process]) -> Iterator[None]:
    """Inside, SIGTERM reaches this process when it has ended the others, or ``GRACE`` seconds
    later: what saves for longer ends with its parent. Main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(*_) -> None:
        for process in processes:
            process.terminate()
        end = time.monotonic() + GRACE
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _work(work: bytes, sender: Connection) -> None:
    """The other process. It ends with its parent, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    target, call = pickle.loads(work)
    try:
        target(*call)
    except Exception as error:
        sender.send(_sendable(error))
    else:
        sender.send(None)


def _sendable(error: Exception) -> Exception:
    """The error with its traceback as a note; in words where pickle cannot carry it over."""
    note = f"in a process beside:\n{traceback.format_exc()}"
    error.add_note(note)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is made again
        error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(note)
    return error


def _calls(function: Callable, calls: list[tuple], config: RuntimeConfig, seed: int) -> None:
    runtime.setup(config, seed)
    for call in calls:
        function(*call)


def _as_rank(function: Callable, arguments: tuple, config: RuntimeConfig, seed: int) -> None:
    device = dist.local_device(runtime.setup(config, seed).device)
    layout = dist.join(dist.processes(), 1, device)
    function(*arguments, device, layout)
    dist.leave()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
