"""Runs side by side: the work is done, errors and deaths are told, nothing outlives the caller."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from kexa.config import ConfigError, RuntimeConfig
from kexa.dist import Layout
from kexa.parallel import BesideFailed, across, beside

TWO = RuntimeConfig(threads=2, device="cpu", tensorboard=False)


def note(path: Path) -> None:
    path.write_text(f"{os.getpid()} {torch.get_num_threads()}\n")


def refuse(text: str) -> None:
    raise ConfigError(text)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever(path: Path) -> None:
    note(path)
    time.sleep(600)


def save_on_sigterm(path: Path, device: torch.device | None = None, layout: Layout | None = None):
    """As a training run does, in its own time."""
    path = path.with_name(f"{path.name}{layout.rank if layout else ''}")

    def save(*_) -> None:
        time.sleep(2)
        path.write_text("saved")
        os._exit(0)

    signal.signal(signal.SIGTERM, save)
    wait_for_ever(path)


def ignore_sigterm(path: Path, device: torch.device | None = None, layout: Layout | None = None):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait_for_ever(path.with_name(f"{path.name}{layout.rank if layout else ''}"))


class TwoParts(Exception):
    """Pickle makes it again from its message alone, which is one argument too few."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what}: {why}")


def refuse_in_two_parts() -> None:
    raise TwoParts("a bad key", "nobody knows it")


def refuse_with_a_lock() -> None:
    error = ConfigError("a bad key")
    error.lock = threading.Lock()
    raise error


def sum_ranks(directory: Path, device: torch.device, layout: Layout) -> None:
    total = torch.tensor(float(layout.rank + 1))
    torch.distributed.all_reduce(total)
    (directory / str(layout.rank)).write_text(f"{total:g} {torch.get_num_threads()} {device}")


def refuse_on_one(device: torch.device, layout: Layout) -> None:
    if layout.rank == 1:
        raise ConfigError("a bad key")
    torch.distributed.barrier()


def die_on_one(device: torch.device, layout: Layout) -> None:
    if layout.rank == 1:
        die()
    torch.distributed.barrier()


def test_the_other_process_does_every_call_with_half_of_the_threads(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with beside(note, [(path,) for path in paths], TWO, 0):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    done = [path.read_text().split() for path in paths]
    assert done[0] == done[1] and int(done[0][0]) != os.getpid() and done[0][1] == "1"


def test_one_thread_leaves_the_work_to_the_caller(tmp_path):
    with beside(note, [(tmp_path / "a",)], dataclasses.replace(TWO, threads=1), 0):
        pass
    assert not (tmp_path / "a").exists()


def test_nothing_to_do_beside_leaves_all_threads_here():
    torch.set_num_threads(2)
    with beside(note, [], TWO, 0):
        assert torch.get_num_threads() == 2 and not multiprocessing.active_children()


def test_an_error_over_there_is_raised_here_with_its_traceback():
    with (
        pytest.raises(ConfigError, match="a bad key") as caught,
        beside(refuse, [("a bad key",)], TWO, 0),
    ):
        pass
    assert "in refuse" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (refuse_in_two_parts, "TwoParts: a bad key: nobody knows it"),
        (refuse_with_a_lock, "ConfigError: a bad key"),
    ],
)
def test_an_error_that_cannot_travel_is_raised_here_in_words(function, told):
    with pytest.raises(RuntimeError, match=told) as caught, beside(function, [()], TWO, 0):
        pass
    assert f"in {function.__name__}" in caught.value.__notes__[0]


def test_a_killed_process_is_named():
    with (
        pytest.raises(BesideFailed, match=r"ended with code -9 .*run the stage again"),
        beside(die, [()], TWO, 0),
    ):
        pass


def wait_for_pid(path: Path) -> int:
    """The process that :func:`wait_for_ever` runs in, once it has written its number whole."""
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text().split()[0])


def test_an_error_here_ends_the_process_over_there(tmp_path):
    with pytest.raises(KeyError), beside(wait_for_ever, [(tmp_path / "pid",)], TWO, 0):
        pid = wait_for_pid(tmp_path / "pid")
        raise KeyError
    assert not psutil.pid_exists(pid)


def caller(directory: Path, body: str) -> subprocess.Popen:
    """Another process that runs ``body``, lines of python that may name ``directory``."""
    script = directory / "script.py"
    head = """
        import time
        from pathlib import Path
        from kexa import parallel
        from kexa.parallel import across, beside
        from tests.test_parallel import TWO, ignore_sigterm, save_on_sigterm, wait_for_ever
        if __name__ == "__main__":
    """
    place = f"directory = Path({str(directory)!r})\n"
    script.write_text(textwrap.dedent(head) + textwrap.indent(place + body, "    "))
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)}
    )


BESIDE = "with beside({}, [(directory / 'pid',)], TWO, 0):\n    time.sleep(600)\n"
ACROSS = "across(2, {}, (directory / 'pid',), TWO, 0)\n"


def test_it_ends_when_its_parent_is_killed(tmp_path):
    parent = caller(tmp_path, BESIDE.format("wait_for_ever"))
    child = psutil.Process(wait_for_pid(tmp_path / "pid"))
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("body", "ranks"), [(BESIDE, [""]), (ACROSS, ["0", "1"])], ids=["beside", "across"]
)
def test_sigterm_waits_until_the_others_have_saved(tmp_path, body, ranks):
    parent = caller(tmp_path, body.format("save_on_sigterm"))
    for rank in ranks:
        wait_for_pid(tmp_path / f"pid{rank}")
    parent.terminate()
    assert parent.wait(timeout=120) == -signal.SIGTERM
    assert all((tmp_path / f"pid{rank}").read_text() == "saved" for rank in ranks)


@pytest.mark.parametrize(
    ("body", "ranks"), [(BESIDE, [""]), (ACROSS, ["0", "1"])], ids=["beside", "across"]
)
def test_sigterm_does_not_wait_for_ever(tmp_path, body, ranks):
    parent = caller(tmp_path, "parallel.GRACE = 1.0\n" + body.format("ignore_sigterm"))
    others = [psutil.Process(wait_for_pid(tmp_path / f"pid{rank}")) for rank in ranks]
    parent.terminate()
    assert parent.wait(timeout=60) == -signal.SIGTERM
    _, alive = psutil.wait_procs(others, timeout=10)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_ranks_meet_and_share_the_threads(tmp_path):
    before = dict(os.environ)
    across(2, sum_ranks, (tmp_path,), TWO, 0)
    told = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert told == {"0": "3 1 cpu", "1": "3 1 cpu"}
    assert os.environ == before


def test_one_process_leaves_the_work_to_the_caller_too(tmp_path):
    across(1, sum_ranks, (tmp_path,), TWO, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "function, error, told",
    [(refuse_on_one, ConfigError, "a bad key"), (die_on_one, Exception, "code -9|gloo")],
)
def test_a_rank_that_fails_ends_all(function, error, told):
    started = time.monotonic()
    with pytest.raises(error, match=told):
        across(2, function, (), TWO, 0)
    assert time.monotonic() - started < 60
    assert not multiprocessing.active_children()
