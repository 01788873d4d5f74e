"""Checkpoints that are either whole and ours, or refused.

    step-00000100/          one directory per checkpoint, named for the steps done
        __0_0.distcp, ...   tensors, written by torch.distributed.checkpoint: each rank its shards
        .metadata           its table of tensors and shards
        values.pt           everything that is not a tensor
        manifest.json       identity of the run, step, size and SHA-256 of every file above
    history.jsonl           one line per finished optimizer step

A checkpoint is written under a hidden name, synced to disk, and renamed when it is complete, so a
crash, a kill or a full disk leaves the earlier ones as they were. All checksums are verified
before anything is loaded. :func:`resume` takes the newest checkpoint that is whole: a damaged newer
one is renamed to ``step-00000100.damaged`` with a warning. If none is whole it raises, because
starting over is for a person to decide.

``identity`` is a short text of the caller's that says which run this is (a hash of config, seed
and inputs). A checkpoint of another identity is refused: resuming it would silently mix two runs.
:func:`branch` is the way to begin one run where another was.

With several processes every function here is called by all of them, on one file system. Tensors
that are DTensors are saved as shards and read back as the shards of whatever mesh they meet, so a
checkpoint of four ranks resumes on two or on one.

``history.jsonl`` lets a resumed run show its whole curve. Lines after the checkpoint resumed from
are dropped.

``.metadata`` is a pickle of PyTorch's, and a checksum is no signature: resume only checkpoints of
your own.

chosen: a run writes in the background (:class:`Background`): it waits for a copy of the state in
host memory only, and goes on while a thread writes that to disk. Measured at the laptop profile on
one core, a copy takes 0.008 s and a save 0.23 s, beside a step of 0.95 s and one save in 200 steps:
there it makes no difference. Of the 236B model 64 ranks write 1.7 TiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from kexa.config import as_dict
from kexa.record import CannotWrite, write_atomic, writing
from kexa.train.nested import put_tensors, take_tensors, tensor_paths

FORMAT = "kexa-checkpoint-2"
MANIFEST = "manifest.json"
VALUES = "values.pt"
LEFT_OVER = re.compile(r"\.step-\d{8,}\.(partial|old)|\.history\.jsonl\.\d+\.tmp")

# PyTorch's, where there is one process, as intended. Not ignored where it comes up: what changes
# the filters for a while must not run in a thread.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def identity(**parts: Any) -> str:
    """A short hash of everything that makes a run this run: config sections, seed, inputs."""
    text = json.dumps(parts, sort_keys=True, default=as_dict)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the message says which, why, and what to do."""


def rank() -> int:
    """This process's number among those of the run; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def save(
    directory: Path,
    step: int,
    identity: str,
    state: Mapping[str, Any],
    keep: int = 2,
    milestones: Collection[int] = (),
) -> Path:
    """Write ``state`` as the checkpoint after ``step`` steps; returns its directory.

    Args:
        state: nested dicts, lists and tuples of tensors and plain values; keys are strings. A
            tensor is the same on all ranks or a DTensor.
        keep, milestones: the last ``keep`` checkpoints stay, and those after the steps in
            ``milestones``; others are deleted.

    Raises:
        ValueError: ``keep`` is not positive.
        kexa.record.CannotWrite: the disk is full or refuses. The earlier checkpoints are intact and
            nothing of this one is left.
    """
    tensors: dict[str, Tensor] = {}
    values = take_tensors(state, "", tensors)
    return _save(directory, step, identity, values, tensors, keep, milestones)


class Background:
    """Checkpoints of one run that are written while it goes on, one at a time.

    ``with Background(directory, identity) as checkpoints``: on leaving, the last one is on disk or
    its error is raised. All ranks enter, save, wait and leave together. The thread ends with its
    process, so that a kill leaves what it leaves of :func:`save`: a checkpoint or none.

    Args:
        directory, identity, keep, milestones: as for :func:`save`.
    """

    def __init__(
        self, directory: Path, identity: str, keep: int = 2, milestones: Collection[int] = ()
    ):
        self._directory, self._identity = directory, identity
        self._keep, self._milestones = keep, milestones

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "checkpoint", _use_device, (_device(),))
        self._writing: Future | None = None
        # of the thread alone: what ranks say there must not mix with what they say meanwhile
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.wait()
        except Exception:
            if kind in (None, GeneratorExit):
                raise  # otherwise the error under way says more
        finally:
            self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """:func:`save` of the state as it is now; returns once that is copied to host memory.

        Waits for the checkpoint before this one, and raises what went wrong with it.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}
        values = take_tensors(state, "", tensors)
        copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        self._writing = self._thread.submit(
            _save, self._directory, step, self._identity, values, copies, self._keep,
            self._milestones, self._group,
        )  # fmt: skip

    def wait(self) -> None:
        """Until the last checkpoint is on disk.

        Raises:
            ValueError, kexa.record.CannotWrite: as :func:`save`.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _save(
    directory: Path,
    step: int,
    identity: str,
    values: Any,
    tensors: dict[str, Tensor],
    keep: int,
    milestones: Collection[int],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """:func:`save` of what :func:`take_tensors` returned, which ranks talk about in ``group``."""
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the checkpoint that is written has to stay")
    directory = Path(directory)
    path = _path(directory, step)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _together(group):
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with _plain_errors() as alone:
            writer = _Writer(partial)
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
        with _together(group):
            own = list(partial.glob(f"__{rank()}_*"))
            if rank() == 0:
                buffer = io.BytesIO()
                torch.save(values, buffer)
                _write(partial / VALUES, buffer.getvalue())
                own += [partial / ".metadata", partial / VALUES]
            summary = {file.name: [file.stat().st_size, _sha256(file)] for file in own}
        files = {name: entry for part in _everyone(summary, group) for name, entry in part.items()}
        with _together(group):
            if rank() == 0:
                content = {"format": FORMAT, "identity": identity, "step": step, "files": files}
                _write(partial / MANIFEST, _manifest_text(content).encode())
                _publish(partial, path)
                for old in list_checkpoints(directory)[:-keep]:
                    if _step_of(old) not in milestones:
                        _delete(old)
    except OSError as error:
        others = [p.name for p in list_checkpoints(directory) if p != path]
        good = f"; {others[-1]} is intact, the run goes on from there" if others else ""
        raise CannotWrite(
            f"cannot write checkpoint {path.name} ({error.strerror or error}): free space, or "
            f"choose another output directory{good}"
        ) from error
    finally:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, oldest first. Whether they are whole shows when loading."""
    found = (p for p in Path(directory).glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))
    return sorted(found, key=_step_of)


def load(path: Path, identity: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The state in one checkpoint.

    Args:
        like: how tensors are placed, by name: a model's ``state_dict()``. A stored tensor that has
            one of these names as a key of its own or of a dict around it (an optimizer's state of
            that parameter), and the same shape, becomes a DTensor of the same mesh and placement
            where the one in ``like`` is a DTensor. All others are read whole, on the CPU.

    Raises:
        CheckpointError: not a checkpoint, damaged, or of another run.
    """
    path = Path(path)
    if reason := damage(path):
        others = [p.name for p in list_checkpoints(path.parent) if _step_of(p) < _step_of(path)]
        remedy = f"resume from {others[-1]}" if others else "start from the beginning"
        raise CheckpointError(f"{path.name} {reason}; delete it to {remedy}")
    return _read(path, identity, like or {})


def resume(
    directory: Path, identity: str, like: Mapping[str, Tensor] | None = None
) -> dict[str, Any] | None:
    """The state in the newest whole checkpoint of a directory; None where there is none at all.

    Newer ones that are damaged are renamed, with a warning that says what is wrong with them. What
    a killed process left half-written is removed.

    Raises:
        CheckpointError: there are checkpoints but none is whole, or the newest whole one is of
            another run.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(directory)):
        reason = damage(path)
        if not reason:
            state = _read(path, identity, like or {})
            if rank() == 0:
                for bad, why in damaged.items():
                    aside = bad.with_name(f"{bad.name}.damaged")
                    _remove(aside)
                    bad.rename(aside)
                    warnings.warn(
                        f"{bad.name} {why}: renamed to {aside.name}, resuming from {path.name}",
                        stacklevel=2,
                    )
            break
        damaged[path] = reason
    else:
        if damaged:
            told = "; ".join(f"{bad.name} {why}" for bad, why in damaged.items())
            raise CheckpointError(
                f"no checkpoint can be used: {told}; delete them to start from the beginning"
            )
        state = None
    if rank() == 0:
        for left in Path(directory).glob(".*"):
            if LEFT_OVER.fullmatch(left.name):
                _remove(left)
    return state


def branch(
    source: Path,
    step: int,
    of: str,
    directory: Path,
    identity: str,
    like: Mapping[str, Tensor] | None = None,
) -> None:
    """Let another run begin where one was after ``step`` steps: its state and the history up to it.

    ``source`` stays as it is. Nothing happens where ``directory`` holds checkpoints already.

    Args:
        source, step, of: the directory of the run that is left, which of its checkpoints, and the
            identity it was saved under.
        directory, identity: of the run that begins.
        like: as in :func:`load`.

    Raises:
        CheckpointError: as :func:`load` and :func:`read_history`.
        kexa.record.CannotWrite: as :func:`save`; the next call begins again.
    """
    if list_checkpoints(directory):
        return
    state = load(_path(source, step), of, like)
    lines = _history(source, step)
    with _together():
        if rank() == 0:
            write_atomic(Path(directory) / "history.jsonl", "".join(lines))
    save(directory, step, identity, state)


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, as the rest of a sentence that begins with its name.

    Empty when every file is there with its checksum. Ranks verify a share each and agree.
    """
    try:
        manifest = _read_manifest(path)
    except (OSError, ValueError, TypeError, KeyError):
        manifest = None
    if manifest is None:
        mine = f"is not a whole checkpoint: its {MANIFEST} is missing or damaged"
    elif manifest["format"] != FORMAT or manifest["step"] != _step_of(path):
        mine = f"is not what its name says: format {manifest['format']}, step {manifest['step']}"
    else:
        share = sorted(manifest["files"].items())[rank() :: ranks()]
        mine = next((flaw for name, entry in share if (flaw := _flaw(path / name, *entry))), "")
    return next((flaw for flaw in _everyone(mine) if flaw), "")


def rng_states() -> list[dict[str, Any]]:
    """The states of python's, numpy's and torch's generators of every rank."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = torch.cuda.is_available()
    return _everyone(
        {
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if cuda else None,
        }
    )


def set_rng_states(states: list[dict[str, Any]]) -> None:
    """Put back what :func:`rng_states` returned. A rank that was not there then keeps its own."""
    if rank() >= len(states):
        return
    state = states[rank()]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def read_history(directory: Path, step: int) -> list[dict[str, Any]]:
    """The first ``step`` records of ``history.jsonl``; later lines are dropped from the file.

    Raises:
        CheckpointError: fewer whole records than ``step``, or a line that is damaged.
    """
    lines = _history(directory, step)
    if rank() == 0:
        write_atomic(Path(directory) / "history.jsonl", "".join(lines))
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            raise CheckpointError(
                f"line {number} of history.jsonl is damaged; empty the checkpoint directory to "
                "start from the beginning"
            ) from None
    return records


def append_history(directory: Path, records: list[dict[str, Any]]) -> None:
    """Append records to ``history.jsonl``, one line each, and sync them to disk."""
    if rank() == 0:
        path = Path(directory) / "history.jsonl"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                _sync(file)


def _history(directory: Path, step: int) -> list[str]:
    """The first ``step`` lines of a history, as they are in the file."""
    path = Path(directory) / "history.jsonl"
    lines = (
        path.read_text(encoding="utf-8").splitlines(keepends=True)[:step] if path.is_file() else []
    )
    if len(lines) < step or not all(line.endswith("\n") for line in lines):
        raise CheckpointError(
            f"history.jsonl holds {len(lines)} of the {step} steps before the checkpoint; "
            "empty the checkpoint directory to start from the beginning"
        )
    return lines


def _device() -> int | None:
    """This thread's GPU, which a new thread does not inherit."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _use_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _everyone(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """``value`` of every rank, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


@contextlib.contextmanager
def _together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """All ranks leave together, and if one could not write, all raise its error."""
    error = None
    try:
        yield
    except OSError as caught:
        error = caught
    failures = [e for e in _everyone(error, group) if e is not None]
    if failures:
        raise failures[0]


class _Writer(dcp.FileSystemWriter):
    """Where the disk is full, says so: PyTorch's zip writer covers that error by one of its own."""

    def write_data(self, *arguments: Any) -> Any:
        try:
            return super().write_data(*arguments)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error  # noqa: B904


@contextlib.contextmanager
def _plain_errors() -> Iterator[bool]:
    """Raise what went wrong on a rank instead of PyTorch's wrapping; yields ``no_dist``."""
    try:
        yield not dist.is_initialized()
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((c for c in causes if isinstance(c, OSError)), causes[0]) from None


def _read(path: Path, identity: str, like: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state in a checkpoint that is whole."""
    manifest = _read_manifest(path)
    if manifest["identity"] != identity:
        raise CheckpointError(
            f"{path.name} belongs to another run (identity {manifest['identity']!r}, this run is "
            f"{identity!r}); use an empty checkpoint directory"
        )
    values = torch.load(path / VALUES, weights_only=True)
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    names = dict(tensor_paths(values, ()))
    tensors = {
        key: _empty(entry.size, entry.properties.dtype, [like.get(n) for n in names[key]])
        for key, entry in stored.items()
    }
    with _plain_errors() as alone:
        dcp.load(tensors, storage_reader=reader, no_dist=alone)
    return put_tensors(values, tensors)


def _empty(size: torch.Size, dtype: torch.dtype, models: list[Tensor | None]) -> Tensor:
    for model in models:
        if isinstance(model, DTensor) and model.shape == size:
            return torch.empty_like(model, dtype=dtype)
    return torch.empty(size, dtype=dtype)


def _manifest_text(content: dict[str, Any]) -> str:
    body = json.dumps(content, indent=1, sort_keys=True)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"content": content, "sha256": checksum}, indent=1, sort_keys=True) + "\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError, KeyError or TypeError where it is not, byte for byte, what was written."""
    text = (path / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(text)["content"]
    if text != _manifest_text(content):
        raise ValueError("the manifest does not match its checksum")
    return content


def _flaw(file: Path, size: int, sha256: str) -> str:
    if not file.is_file():
        return f"is damaged: {file.name} is missing"
    if file.stat().st_size != size:
        return f"is damaged: {file.name} has {file.stat().st_size:,} bytes, not {size:,}"
    if _sha256(file) != sha256:
        return f"is damaged: {file.name} does not match its checksum"
    return ""


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(partial: Path, path: Path) -> None:
    """Give a finished directory its name, durably."""
    _sync_directory(partial)
    if path.exists():
        _delete(path)
    partial.rename(path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Delete a checkpoint; a kill halfway leaves nothing that looks like one."""
    hidden = path.with_name(f".{path.name}.old")
    _remove(hidden)
    path.rename(hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _path(directory: Path, step: int) -> Path:
    return Path(directory) / f"step-{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
