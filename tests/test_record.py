"""A run's record: complete, repeatable, and never half written."""

from __future__ import annotations

import errno
import json
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kexa import record
from kexa.config import load
from kexa.record import CheckFailed, Run, read_json, write_atomic


@pytest.fixture
def run(tmp_path):
    return Run("04_pretraining", load("smoke"), 3, tmp_path / "04")


def test_results_hold_values_checks_figures_and_where_they_come_from(run):
    run.value("loss", torch.tensor(1.5), "nats/token", headline=True)
    run.value("shares", np.array([0.5, 0.5]))
    run.value("diverged", [1.0, float("nan")])
    figure = plt.figure()
    run.figure(figure, "curve", "A curve.")
    plt.close(figure)
    run.check("loss fell", True, "1.5")
    run.finish()
    results = json.loads((run.dir / "results.json").read_text())
    assert results["stage"] == "04_pretraining"
    assert results["values"]["loss"] == {
        "value": 1.5, "unit": "nats/token", "note": "", "headline": True,
    }  # fmt: skip
    assert results["values"]["shares"]["value"] == [0.5, 0.5]
    assert results["values"]["diverged"]["value"] == [1.0, "nan"]
    assert results["checks"] == [{"claim": "loss fell", "holds": True, "measured": "1.5"}]
    assert results["figures"] == [{"file": "curve.png", "caption": "A curve."}]
    assert (run.dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert results["environment"]["profile"] == "smoke"
    assert results["environment"]["seed"] == 3
    assert results["timings"]["peak_memory_gib"] > 0.05


def test_equal_figures_are_equal_bytes(run):
    for name in ("one", "two"):
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        run.figure(figure, name, "")
        plt.close(figure)
    assert (run.dir / "one.png").read_bytes() == (run.dir / "two.png").read_bytes()


def test_a_check_that_does_not_hold_fails_after_writing(run, capsys):
    run.check("pigs fly", False, "0 m")
    assert capsys.readouterr().out == "FAILS: pigs fly (0 m)\n"
    with pytest.raises(CheckFailed, match=r"pigs fly \(0 m\)"):
        run.finish()
    assert read_json(run.dir / "results.json")["checks"][0]["holds"] is False


def test_a_resumed_record_goes_on_where_it_was_cut(run):
    for step in range(3):
        run.log("train", step, loss=1.0 / (step + 1))
    whole = (run.dir / "metrics.jsonl").read_text()
    (run.dir / "metrics.jsonl").write_text(whole[:-9])  # the kill came inside the last line
    again = Run("04_pretraining", load("smoke"), 3, run.dir)
    for step in (1, 2):
        again.log("train", step, loss=1.0 / (step + 1))
    assert (run.dir / "metrics.jsonl").read_text() == whole


def events(directory):
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_what_is_logged_reaches_tensorboard_where_the_config_asks(tmp_path):
    config = load("smoke", {"runtime.tensorboard": True})
    run = Run("04_pretraining", config, 3, tmp_path)
    for step in range(3):
        run.log("train", step, loss=torch.tensor(2.0 / (step + 1)), load=[1, 2], part={"a": 0.5})
    run.log("train", 3, loss=float("nan"), note="text is no scalar")
    again = Run("04_pretraining", config, 3, tmp_path)  # resumed: nothing twice
    again.log("train", 2, loss=7.0)
    again.log("held out", 4, loss=1.0)
    found = events(tmp_path / "tensorboard")
    assert found.keys() == {
        "train/loss", "train/load/0", "train/load/1", "train/part/a", "held out/loss",
    }  # fmt: skip
    assert found["train/loss"][:3] == [(0, 2.0), (1, 1.0), (2, pytest.approx(2 / 3))]
    assert found["train/loss"][3][0] == 3 and math.isnan(found["train/loss"][3][1])
    assert found["train/load/1"] == [(0, 2.0), (1, 2.0), (2, 2.0)]
    assert found["held out/loss"] == [(4, 1.0)]


def test_metrics_are_the_same_bytes_with_tensorboard_and_without(tmp_path):
    for asked in (True, False):
        config = load("smoke", {"runtime.tensorboard": asked})
        Run("a", config, 0, tmp_path / str(asked)).log("train", 0, loss=1.0)
    with_events, without = tmp_path / "True", tmp_path / "False"
    assert (with_events / "metrics.jsonl").read_bytes() == (without / "metrics.jsonl").read_bytes()
    assert [p.name for p in without.iterdir()] == ["metrics.jsonl"]
    assert not any(load(p).runtime.tensorboard for p in ("smoke", "laptop", "h100", "full"))


def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomic(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write results.json .No space left on device.: free"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_read_json_takes_half_a_file_for_none(tmp_path):
    (tmp_path / "half.json").write_text('{"a": 1')
    assert read_json(tmp_path / "half.json") == read_json(tmp_path / "absent.json") == {}
