"""The command under torchrun: a killed rank ends the job, the same command goes on."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from kexa.config import ROOT, load
from kexa.data.choices import Question
from kexa.record import CannotWrite
from kexa.tokenizer import save, train_baseline
from kexa.train import __main__ as command
from kexa.train.__main__ import main, override, tokens_key
from kexa.train.checkpoint import list_checkpoints
from kexa.train.evaluation import Evaluation, HeldOut, load_evaluation, save_evaluation
from tests.dist.forked import run
from tests.tokenizer import conftest as words

STEPS = 40
SETTINGS = [
    "tokenizer.vocab_size=1000",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.head_dim=8",
    "model.intermediate_size=32",
    "model.moe_intermediate_size=8",
    "pretrain.sequence_length=16",
    "pretrain.batch_size=4",
    f"pretrain.stage_steps={{foundation={STEPS - 2},domain=1,reasoning=1}}",
    "pretrain.numerics=fp32",
    "pretrain.checkpoint_every=5",
]
SHORT = "pretrain.stage_steps={foundation=2,domain=1,reasoning=1}"


def prepare(directory) -> list[str]:
    """A tokenizer and streams of random tokens in their places; the command's arguments."""
    vocabulary, out = directory / "tokenizer", directory / "out"
    corpora = {category: words.documents(category) for category in words.WORDS}
    save(train_baseline(corpora, words.CONFIG), vocabulary)
    config = load("smoke", dict(map(override, SETTINGS)))
    names = [*words.WORDS, *config.pretrain.synthetic_documents]
    for i, name in enumerate(names):
        folder = out / "tokens" / name
        folder.mkdir(parents=True)
        np.random.default_rng(i).integers(2, 1000, 4000, dtype=np.int32).tofile(
            folder / "tokens.bin"
        )
        np.save(folder / "offsets.npy", np.arange(0, 4001, 40, dtype=np.int64))
    rows = torch.randint(2, 1000, (2, 16), generator=torch.Generator().manual_seed(0))
    questions = [Question([2, 3], [[4], [5]], [1, 1], i) for i in range(2)]
    save_evaluation(
        Evaluation({"en": HeldOut(rows, rows * 0, 4.0)}, {"recall": questions}),
        out / "tokens" / "evaluation.pt",
    )
    done = {"key": tokens_key(config, 0, vocabulary), "streams": names}
    (out / "tokens" / "streams.json").write_text(json.dumps(done))
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["--tokenizer", str(vocabulary), "--out", str(out), *sets]


def printed(arguments: list[str]) -> tuple[int, str]:
    """The exit code of the command on one process, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(arguments)
    return code, out.getvalue()


def test_a_lost_rank_is_told_from_a_fault_of_our_own(monkeypatch, capsys):
    def fail(text):
        def run(_):
            raise RuntimeError(text)

        monkeypatch.setattr(command, "_run", run)

    fail("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert main([]) == 1
    assert "another rank was lost; run the same command again" in capsys.readouterr().err
    fail("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        main([])


def test_a_fault_in_training_keeps_its_traceback(tmp_path, monkeypatch):
    def steps():
        raise ValueError("a fault of our own")
        yield

    arguments = prepare(tmp_path)
    monkeypatch.setattr(command, "start_curriculum", lambda *_: (None, None, steps()))
    with pytest.raises(ValueError, match="a fault of our own"):
        main(arguments)


def test_other_settings_are_another_run(tmp_path, monkeypatch, capsys):
    arguments = [*prepare(tmp_path), "--set", SHORT]
    out = tmp_path / "out"
    done = out / "tokens" / "streams.json"
    streams = json.loads(done.read_text())["streams"]
    assert printed(arguments)[0] == 0

    # an emptied directory of checkpoints: nothing of the run before is told as of this one
    shutil.rmtree(out / "checkpoints")
    assert printed([*arguments, "--set", "pretrain.learning_rate=1e-4"])[0] == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and max(line["learning_rate"] for line in lines) <= 1e-4

    # other text: encoded anew, and not gone on with
    arguments += ["--set", "pretrain.learning_rate=1e-4", "--set", "data.heldout_share=0.06"]
    known = load_evaluation(out / "tokens" / "evaluation.pt")
    monkeypatch.setattr(command, "load_corpus", lambda _: None)
    monkeypatch.setattr(command, "stage_evaluation", lambda *_: known)
    monkeypatch.setattr(command, "training_streams", no_space)
    assert printed(arguments)[0] == 2
    assert not done.exists()  # what it says may not be there any more
    monkeypatch.setattr(command, "training_streams", lambda *_: dict.fromkeys(streams))
    capsys.readouterr()
    assert printed(arguments)[0] == 2
    assert "belongs to another run" in capsys.readouterr().err


def no_space(*_):
    raise CannotWrite("the disk is full")


def test_a_branch_decays_early_and_leaves_its_own_results(tmp_path):
    stages = "pretrain.stage_steps={foundation=10,domain=4,reasoning=10}"
    arguments = [*prepare(tmp_path), "--set", stages]
    assert printed([*arguments, "--decay", "domain"])[0] == 2  # nothing to leave yet
    assert printed(arguments)[0] == 0
    whole = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    code, text = printed([*arguments, "--decay", "domain"])
    out = tmp_path / "out" / "decay-domain"
    assert code == 0 and "domain ends after 14 steps" in text
    rates = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    peak = max(line["learning_rate"] for line in rates)
    assert len(rates) == 14 and rates[10]["learning_rate"] <= peak
    assert rates[13]["learning_rate"] < 0.5 * peak
    assert (out / "model" / "model.safetensors").read_bytes() != whole
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == whole


def test_a_killed_rank_ends_the_job_and_the_command_goes_on(tmp_path):
    arguments = prepare(tmp_path)
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    job = subprocess.Popen(
        [*torchrun, "--standalone", "-m", "kexa.train", "--ep", "2", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not list_checkpoints(out / "checkpoints"):
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(job.pid).children(recursive=True) if "--ep" in p.cmdline()]
    assert len(ranks) == 2
    killed = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGKILL)
    text = job.communicate(timeout=120)[0]
    assert time.monotonic() - killed < 60
    assert job.returncode != 0
    assert re.search(r"rank +: 1 .*\n.*\n.*\n.*Signal 9 \(SIGKILL\)", text), text
    assert not (out / "results.json").exists()

    # on one process: the checkpoint is cut anew, and so are the batches
    arguments += ["--set", "pretrain.accumulate=2", "--set", "pretrain.offload_optimizer=true"]
    ((code, text),) = run(printed, 1, arguments)
    assert code == 0
    assert re.search(r"going on from step-000000(05|10|15|20|25|30|35)", text)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert {"total", "violation/0", "router_entropy/0", "update_rms/matrix"} <= lines[0].keys()
    assert (out / "model" / "model.safetensors").is_file()
    told = re.findall(
        r"(\w+) ends after (\d+) steps: bits per byte, en (\d\.\d+), probe recall 0.500\n", text
    )
    values = json.loads((out / "results.json").read_text())["values"]
    assert [(stage, int(steps)) for stage, steps, _ in told] == [
        ("foundation", STEPS - 2), ("domain", STEPS - 1), ("reasoning", STEPS)
    ]  # fmt: skip
    for stage, _, bits in told:
        assert f"{values[f'bits per byte, en, after {stage}']['value']:.3f}" == bits
