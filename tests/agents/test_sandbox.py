"""Programs end as they should, and none outlives its limits."""

import time

import pytest

from kexa.agents.sandbox import run_python


def test_a_program_that_ends_passes_and_one_that_raises_fails():
    assert run_python("assert 1 + 1 == 2").ending == "passed"
    outcome = run_python("assert 1 + 1 == 3, 'no'")
    assert outcome.ending == "failed"
    assert outcome.message == "AssertionError: no"


@pytest.mark.parametrize("leave", ["exit()", "raise SystemExit", "import os; os._exit(0)"])
def test_a_program_that_leaves_early_has_not_passed(leave):
    assert run_python(f"{leave}\nassert False").ending == "failed"


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(60)", "import os; os.fork(); input(); [0] * 3"],
)
def test_no_program_outlives_its_time(program):
    start = time.monotonic()
    outcome = run_python(program, seconds=1)
    assert outcome.ending in ("timeout", "failed")
    assert time.monotonic() - start < 10


def test_what_a_program_leaves_running_is_stopped(tmp_path):
    mark = tmp_path / "mark"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.close(2)\n"
        f"    time.sleep(1); open({str(mark)!r}, 'w').close()\n"
    )
    assert run_python(program).ending == "passed"
    time.sleep(1.5)
    assert not mark.exists()


def test_memory_and_file_size_are_limited():
    assert run_python("x = bytearray(2**31)", megabytes=256).message == "MemoryError"
    assert run_python("open('big', 'wb').write(b'x' * 2**22)").ending == "failed"


def test_the_program_starts_alone(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert (
        run_python("import os; assert os.listdir() == [] and 'SECRET' not in os.environ").ending
        == "passed"
    )
    assert run_python("import sys; assert sys.stdin.read() == ''").ending == "passed"


def test_text_that_is_no_program_fails():
    assert run_python("def f(:\n").ending == "failed"
    assert run_python("print('\ud800')").ending in ("passed", "failed")


def test_bad_limits():
    with pytest.raises(ValueError, match="seconds=0"):
        run_python("", seconds=0)
