"""Checkpoints that are either whole and ours, or refused.

A checkpoint is one file, ``step-00000100.ckpt``: one line of JSON (format, identity of the run,
step, SHA-256 of the rest) and then what ``torch.save`` writes. It is written under another name
and renamed, so a crash leaves the previous one in place; the last two are kept. Reading verifies
the checksum before anything is unpickled, and unpickles tensors and plain values only.

``identity`` is a short text of the caller's that says which run this is (a hash of config, seed
and inputs). A checkpoint of another identity is refused: resuming it would silently mix two runs.

Beside the checkpoints lies ``history.jsonl``: one line per finished optimizer step, so that a
resumed run can show its whole curve. Lines after the checkpoint resumed from are dropped.

chosen: one file and one process, enough up to one GPU; many processes need
``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kexa.config import as_dict
from kexa.record import write_atomic

FORMAT = "kexa-checkpoint-1"
KEPT = 2


def identity(**parts: Any) -> str:
    """A short hash of everything that makes a run this run: config sections, seed, inputs."""
    text = json.dumps(parts, sort_keys=True, default=as_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the message says which file, why, and what to do."""


def save(directory: Path, step: int, identity: str, state: dict[str, Any]) -> Path:
    """Write ``state`` as the checkpoint after ``step`` steps and drop all but the last two."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    header = {
        "format": FORMAT,
        "identity": identity,
        "step": step,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    path = Path(directory) / f"step-{step:08d}.ckpt"
    write_atomic(path, json.dumps(header).encode() + b"\n" + payload)
    for old in list_checkpoints(directory)[:-KEPT]:
        old.unlink()
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    return sorted(Path(directory).glob("step-*.ckpt"))


def load(path: Path, identity: str) -> dict[str, Any]:
    """The state in one checkpoint.

    Raises:
        CheckpointError: not a checkpoint, damaged, or of another run.
    """
    header_line, _, payload = Path(path).read_bytes().partition(b"\n")
    others = [p.name for p in list_checkpoints(Path(path).parent) if p < Path(path)]
    remedy = (
        f"delete it to resume from {others[-1]}"
        if others
        else "delete it to start from the beginning"
    )
    try:
        header = json.loads(header_line)
        known = header["format"] == FORMAT
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise CheckpointError(f"{Path(path).name} is not a checkpoint of this program; {remedy}")
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise CheckpointError(
            f"{Path(path).name} is damaged: its checksum does not match; {remedy}"
        )
    if header["identity"] != identity:
        raise CheckpointError(
            f"{Path(path).name} belongs to another run (identity {header['identity']!r}, "
            f"this run is {identity!r}); "
            "use an empty checkpoint directory"
        )
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def rng_state() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])


def read_history(directory: Path, step: int) -> list[dict[str, Any]]:
    """The first ``step`` records of ``history.jsonl``; later lines are dropped from the file.

    Raises:
        CheckpointError: fewer whole records than ``step``.
    """
    path = Path(directory) / "history.jsonl"
    lines = (
        path.read_text(encoding="utf-8").splitlines(keepends=True)[:step] if path.is_file() else []
    )
    if len(lines) < step or not all(line.endswith("\n") for line in lines):
        raise CheckpointError(
            f"history.jsonl holds {len(lines)} of the {step} steps before the checkpoint; "
            "empty the checkpoint directory to start from the beginning"
        )
    write_atomic(path, "".join(lines))
    return [json.loads(line) for line in lines]


def append_history(directory: Path, records: list[dict[str, Any]]) -> None:
    """Append records to ``history.jsonl``, one line each."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    with open(Path(directory) / "history.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
