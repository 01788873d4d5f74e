"""The runner under planted failures, on a small checkout with three fake notebooks.

The checkout has the runner's real modules and a stand-in for torch and for a URI grammar that
jsonschema builds for seconds and no notebook needs, so that a kernel starts in a second. Every test
runs the command line in its own process, as a user would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kexa.config import ROOT

TORCH = """\
import types
float32 = "torch.float32"
class cuda:
    is_available = staticmethod(lambda: False)
class device(str):
    type = "cpu"
def ignore(*_, **__): ...
set_num_threads = use_deterministic_algorithms = manual_seed = ignore
utils = types.SimpleNamespace(deterministic=types.SimpleNamespace())
get_num_threads = lambda: 1
"""
TABLE = """\
[01_data]
needs = []
sections = ["data"]
[02_train]
needs = ["01_data"]
sections = ["pretrain"]
[03_judge]
needs = ["02_train"]
sections = ["model"]
"""
NOTEBOOK = """\
# %% [markdown]
# # {title}
# %% tags=["parameters"]
profile: str = "smoke"
seed: int = 0
out_dir: str = ""
{parameter}
# %%
from kexa import notebook
run = notebook.begin("{name}", profile, seed, out_dir)
# %%
{body}
# %%
run.finish()
"""
BODIES = {
    "01_data": 'run.value("documents", 7, headline=True)',
    "02_train": """\
before = notebook.require(run, "01_data") / "results.json"
import json, time
total = json.loads(before.read_text())["values"]["documents"]["value"] + seed
for step in range(5):
    done = run.dir / f"checkpoint-{step}"
    if not done.exists():
        done.write_text(str(run.config.pretrain.learning_rate))
        time.sleep(PAUSE)
    total += float(done.read_text())
    run.log("loss", step, loss=total)
run.value("total", total, headline=True)""",
    "03_judge": """\
before = notebook.require(run, "02_train") / "results.json"
total = __import__("json").loads(before.read_text())["values"]["total"]["value"]
run.check("the total is positive", total > 0, f"{total}")""",
}


class Checkout:
    def __init__(self, root: Path):
        self.root = root
        (root / "torch.py").write_text(TORCH)
        (root / "rfc3987_syntax.py").write_text("raise ImportError")
        (root / "configs").mkdir()
        shutil.copy(ROOT / "configs" / "smoke.toml", root / "configs")
        (root / "kexa").mkdir()
        for path in (ROOT / "kexa").glob("*.py"):
            shutil.copy(path, root / "kexa")
        (root / "notebooks").mkdir()
        (root / "notebooks" / "stages.toml").write_text(TABLE)
        for name, body in BODIES.items():
            self.write(name, body.replace("PAUSE", "0"))

    def write(self, name: str, body: str, parameter: str = "") -> None:
        text = NOTEBOOK.format(name=name, title=name, body=body, parameter=parameter)
        (self.root / "notebooks" / f"{name}.py").write_text(text)

    def replace(self, path: str, old: str, new: str) -> None:
        file = self.root / path
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    def start(self, *command: str) -> subprocess.Popen:
        environment = {**os.environ, "IPYTHONDIR": str(self.root / ".ipython")}
        environment = {k: v for k, v in environment.items() if not k.startswith("KEXA_")}
        return subprocess.Popen(
            command, cwd=self.root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def kexa(self, *arguments: str) -> subprocess.CompletedProcess:
        child = self.start(sys.executable, "-m", "kexa", *arguments)
        out, err = child.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, child.returncode, out, err)

    def results(self, name: str, out: str = "runs/smoke") -> dict:
        return json.loads((self.root / out / name / "results.json").read_text())

    def states(self, done: subprocess.CompletedProcess) -> list[str]:
        return [
            line.split("]")[1].split()[1]
            for line in done.stdout.splitlines()
            if line.startswith("[")
        ]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear in {seconds} s"
        time.sleep(0.02)


def test_runs_once_and_again_only_what_changed(checkout):
    first = checkout.kexa("run")
    assert first.returncode == 0, first.stderr
    assert "arning" not in first.stderr
    assert "[ 1/3] 01_data" in first.stdout
    assert "documents 7" in first.stdout
    page = (checkout.root / "runs/smoke/report.html").read_text()
    assert "3 of 3 up to date" in page
    assert "1 of 1 hold" in page
    for name in BODIES:
        assert (checkout.root / "runs/smoke" / name / f"{name}.ipynb").is_file()

    again = checkout.kexa("run")
    assert again.returncode == 0
    assert checkout.states(again) == ["unchanged"] * 3

    before = checkout.results("02_train")["values"]["total"]["value"]
    checkout.replace("configs/smoke.toml", "[pretrain]\n", "[pretrain] # changed\n")
    assert checkout.states(checkout.kexa("run")) == ["unchanged"] * 3
    toml = checkout.root / "configs/smoke.toml"
    lines = [
        "learning_rate = 0.5" if line.startswith("learning_rate") else line
        for line in toml.read_text().split("\n")
    ]
    toml.write_text("\n".join(lines))
    changed = checkout.kexa("run")
    assert checkout.states(changed) == ["unchanged", "done", "done"]
    assert checkout.results("02_train")["values"]["total"]["value"] == 7 + 5 * 0.5 != before

    (checkout.root / "runs/smoke/03_judge/results.json").unlink()
    assert checkout.states(checkout.kexa("run")) == ["unchanged", "unchanged", "done"]
    assert checkout.states(checkout.kexa("run", "--only", "1", "--force")) == ["done"]
    assert checkout.states(checkout.kexa("run", "--from", "03")) == ["unchanged"] * 3


def test_seed_reaches_the_notebooks(checkout):
    assert (
        checkout.kexa("run", "--only", "02", "-p", "seed", "3", "--out", "runs/s").returncode == 0
    )
    assert checkout.results("02_train", "runs/s")["environment"]["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--profile", "nope"), "no profile 'nope'"),
        (("--only", "09"), "no notebook '09'"),
        (("-p", "sede", "1"), "no parameter 'sede'; known: out_dir, profile, seed"),
        (("-p", "profile", "full"), "-p profile: use --profile"),
        (("-p", "seed", "x"), "seed must be a whole number, got 'x'"),
        (("--out", "configs/smoke.toml/runs"), "Not a directory"),
        (("--out", "/proc/kexa"), "/proc/kexa"),
    ],
)
def test_bad_input_is_one_sentence(checkout, arguments, sentence):
    done = checkout.kexa("run", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (checkout.root / "runs").exists()


def test_papermill_alone_makes_what_it_needs_and_is_reused(checkout):
    checkout.kexa("notebooks", "--build")
    command = [sys.executable, "-m", "papermill", "notebooks/03_judge.ipynb", "out.ipynb"]
    alone = checkout.start(*command, "-p", "profile", "smoke")
    _, err = alone.communicate(timeout=120)
    assert alone.returncode == 0, err
    assert checkout.states(checkout.kexa("run")) == ["unchanged"] * 3

    checkout.replace("notebooks/03_judge.ipynb", "the total is positive", "edited by hand")
    edited = checkout.start(*command)
    _, err = edited.communicate(timeout=120)
    assert edited.returncode == 0, err
    assert checkout.results("03_judge")["checks"][0]["claim"] == "edited by hand"
    assert checkout.states(checkout.kexa("run")) == ["unchanged", "unchanged", "done"]

    misspelt = checkout.start(*command, "-p", "sede", "1")
    _, err = misspelt.communicate(timeout=60)
    assert misspelt.returncode != 0
    assert "03_judge has no parameter 'sede'" in err


def test_a_dead_kernel_is_noticed_and_described(checkout):
    body = (
        "import os, time\nprint('last words', flush=True)\ntime.sleep(1.2)\n"
        "_ = (run.dir / 'death').write_text(str(time.time()))\nos._exit(9)"
    )
    checkout.write("02_train", body)
    done = checkout.kexa("run")
    death = float((checkout.root / "runs/smoke/02_train/death").read_text())
    assert time.time() - death < 10
    assert done.returncode == 1
    assert "02_train: the kernel died" in done.stderr
    assert "os._exit(9)" in done.stderr
    assert "last words" in done.stderr
    assert "GiB just before" in done.stderr
    assert "01_data" in done.stdout
    assert "03_judge" not in done.stdout
    assert checkout.results("01_data")["values"]["documents"]["value"] == 7


def test_an_error_stops_the_run_with_cell_and_traceback(checkout):
    checkout.write("02_train", "wrong = 1\n1 / 0")
    done = checkout.kexa("run")
    assert done.returncode == 1
    assert "02_train stopped in cell" in done.stderr
    assert "wrong = 1" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    page = (checkout.root / "runs/smoke/report.html").read_text()
    assert "1 of 3 up to date" in page
    assert ">unfinished<" in page


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ('run.check("pigs fly", False, "0 m")', "pigs fly (0 m)"),
        ("run.config.model", "02_train reads config section 'model'"),
        ('notebook.require(run, "03")', "02_train asks for 03_judge"),
    ],
    ids=["check", "undeclared section", "undeclared stage"],
)
def test_our_errors_are_one_sentence(checkout, body, sentence):
    checkout.write("02_train", body)
    done = checkout.kexa("run")
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    if "check" in body:
        assert checkout.results("02_train")["checks"][0]["holds"] is False


@pytest.mark.parametrize("spare_kernel", [True, False], ids=["runner only", "runner and kernel"])
def test_resume_after_kill_gives_the_same_numbers(checkout, spare_kernel):
    checkout.write("02_train", BODIES["02_train"].replace("PAUSE", "0.3"))
    runner = checkout.start(sys.executable, "-m", "kexa", "run")
    wait_for(checkout.root / "runs/smoke/02_train/checkpoint-1")
    kernels = psutil.Process(runner.pid).children(recursive=True)
    assert kernels
    runner.send_signal(signal.SIGKILL)
    if not spare_kernel:
        for kernel in kernels:
            kernel.kill()
    runner.communicate()
    resumed = checkout.kexa("run")
    assert resumed.returncode == 0, resumed.stderr
    assert checkout.states(resumed) == ["unchanged", "done", "done"]
    assert not any(kernel.is_running() for kernel in kernels)
    metrics = (checkout.root / "runs/smoke/02_train/metrics.jsonl").read_text()

    whole = checkout.kexa("run", "--out", "runs/whole")
    assert whole.returncode == 0
    assert metrics == (checkout.root / "runs/whole/02_train/metrics.jsonl").read_text()
    for name in BODIES:
        one, two = checkout.results(name), checkout.results(name, "runs/whole")
        del one["timings"], two["timings"]
        assert one == two


def test_a_checkpoint_of_another_config_is_not_picked_up(checkout):
    checkout.write("02_train", BODIES["02_train"].replace("PAUSE", "0.3"))
    runner = checkout.start(sys.executable, "-m", "kexa", "run", "--only", "02")
    wait_for(checkout.root / "runs/smoke/02_train/checkpoint-1")
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    checkout.replace("configs/smoke.toml", "learning_rate = ", "learning_rate = 1")
    assert checkout.kexa("run", "--only", "02").returncode == 0
    checkout.kexa("run", "--only", "02", "--out", "runs/whole")
    assert (
        checkout.results("02_train")["values"]
        == checkout.results("02_train", "runs/whole")["values"]
    )


def test_two_runners_do_not_share_a_stage(checkout):
    checkout.write("01_data", "import time; time.sleep(4)")
    first = checkout.start(sys.executable, "-m", "kexa", "run", "--only", "01")
    wait_for(checkout.root / "runs/smoke/01_data/metrics.jsonl")
    second = checkout.kexa("run", "--only", "01")
    assert second.returncode == 2
    assert f"01_data in smoke is being written by process {first.pid}" in second.stderr
    _, err = first.communicate(timeout=60)
    assert first.returncode == 0, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_kernel_and_goes_on_later(checkout, number):
    checkout.write("01_data", "import time; time.sleep(0.1 if (run.dir / 'x').exists() else 60)")
    runner = checkout.start(sys.executable, "-m", "kexa", "run", "--only", "01")
    wait_for(checkout.root / "runs/smoke/01_data/metrics.jsonl")
    kernels = psutil.Process(runner.pid).children(recursive=True)
    runner.send_signal(number)
    _, err = runner.communicate(timeout=30)
    (checkout.root / "runs/smoke/01_data/x").touch()  # not before: the kernel must be asleep
    assert runner.returncode == 128 + number
    assert err.splitlines()[-1] == "kexa: interrupted; run again to go on"
    assert "Traceback" not in err
    psutil.wait_procs(kernels, timeout=10)
    assert not any(kernel.is_running() for kernel in kernels)
    assert checkout.kexa("run", "--only", "01").returncode == 0
