"""Read and write checkpoints in the published layout: safetensors, sharded or not, ``mtp.*``
included.

Writing goes shard by shard and ends with the index and ``config.json``, each file replaced
atomically, so a directory that has a ``config.json`` holds a whole checkpoint. Saving what was
loaded gives equal bytes.

Reading builds the model on the meta device, allocates its tensors once and reads shard by shard
into them, a few megabytes at a time: it takes hardly more memory than the model. Every tensor must
be there, be expected and have its shape; the first that does not is named. The correction bias
stays fp32 in any dtype; its place in ``transformers``' own modules
(``mlp.gate.e_score_correction_bias``) is read too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from kexa.interop.published import from_published, published_tensors, to_published
from kexa.model import KexaForCausalLM
from kexa.record import write_atomic

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
PIECE = 2**21  # numbers read at a time
# reported: the sampling settings of the published generation_config.json
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}


def save_hf(
    model: KexaForCausalLM,
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write ``model`` (and a tokenizer) to the directory ``path``; other weights in it are removed.

    Args:
        model: any dtype and device.
        tokenizer: written beside the weights with its chat template.
        max_shard_bytes: a shard holds at most this much, or one tensor if that is larger.

    Raises:
        ValueError: ``path`` is a file, or ``max_shard_bytes`` is not positive.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file; save_hf needs a directory")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
    path.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = published_tensors(state)
    shards = _shards(tensors, max_shard_bytes)
    count = len(shards)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    for name, shard in zip(names, shards, strict=True):
        # Copies: safetensors refuses the views of one stack that the experts are.
        _write_shard(path / name, {key: tensors[key].detach().cpu().clone() for key in shard})
    if count > 1:
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        owner = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(
            path / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(owner.items()))},
        )
    for stale in set(path.glob("model*.safetensors*")) - {
        path / n for n in [*names, INDEX][: count + (count > 1)]
    }:
        stale.unlink()
    if tokenizer is not None:
        from kexa.tokenizer import save

        save(tokenizer, path)
    config = model.config
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    _write_json(path / "generation_config.json", SAMPLING | ids)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    _write_json(path / "config.json", to_published(config, dtype))


def load_hf(path: str | Path, dtype: torch.dtype | None = None) -> KexaForCausalLM:
    """Read a checkpoint directory into a model on the CPU, in evaluation mode.

    Args:
        path: holds ``config.json`` and safetensors files. dtype: of the weights; None takes the
        ``dtype`` of ``config.json``. The correction bias is fp32.

    Raises:
        ValueError: no or unreadable ``config.json``, missing or truncated file, missing, unexpected
        or
            misshapen tensor.
    """
    path = Path(path)
    written = _read_json(path / "config.json")
    config = from_published(written)
    name = str(written.get("dtype") or written.get("torch_dtype") or "bfloat16")
    if dtype is None:
        dtype = getattr(torch, name.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"config.json has dtype={name!r}, which torch does not know; pass dtype=..."
            )
    with torch.device("meta"):
        model = KexaForCausalLM(config)
    state = {
        name: torch.empty(
            t.shape, dtype=torch.float32 if name.endswith("correction_bias") else dtype
        )
        for name, t in model.state_dict().items()
    }
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    wanted = published_tensors(state)
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    missing = set(wanted)
    for file in _files(path):
        missing -= _copy_shard(file, wanted)
    if missing:
        hint = (
            "; set num_nextn_predict_layers to 0 to load without MTP" if _only_mtp(missing) else ""
        )
        raise ValueError(
            f"checkpoint lacks tensor {min(missing)!r} and {len(missing) - 1} others{hint}"
        )
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in model.moe_layers:
        layer.load_E = torch.zeros(config.num_experts)
    return model.eval()


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index if it has one."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}")
    index = _read_json(path / INDEX)
    files = [path / name for name in sorted(set(index.get("weight_map", {}).values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{INDEX} names {file.name}, which is not in {path}")
    return files


def _copy_shard(file: Path, wanted: dict[str, Tensor]) -> set[str]:
    """Copy one file's tensors to their places; return the names found."""
    found = set()
    try:
        with safe_open(file, framework="pt") as shard, open(file, "rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(start - 8))
            for key in shard.keys():  # noqa: SIM118 - not a dict
                name = key.replace(
                    ".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"
                )
                if name not in wanted:
                    raise ValueError(f"{file.name} holds unexpected tensor {key!r}")
                shape = shard.get_slice(key).get_shape()
                if list(wanted[name].shape) != list(shape):
                    raise ValueError(
                        f"{file.name}: tensor {key!r} has shape {list(shape)}, config.json implies "
                        f"{list(wanted[name].shape)}"
                    )
                _fill(wanted[name], raw, start, key, header[key])
                found.add(name)
    except SafetensorError as error:
        raise ValueError(
            f"{file.name} is not a whole safetensors file ({error}); fetch it again"
        ) from error
    return found


def _fill(out: Tensor, raw: BinaryIO, start: int, key: str, entry: Mapping[str, Any]) -> None:
    """Read one tensor, whose ``entry`` in the header says where it lies behind ``start``.

    Piece by piece from the file: pages of a mapped file would count as this process's memory.
    """
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"tensor {key!r} has dtype {entry['dtype']}; a checkpoint of this model holds "
            f"{', '.join(DTYPES)}"
        )
    raw.seek(start + entry["data_offsets"][0])
    buffer = torch.empty(min(PIECE, out.numel()), dtype=DTYPES[entry["dtype"]])
    for piece in out.view(-1).split(PIECE):
        read = buffer[: len(piece)]
        raw.readinto(read.view(torch.uint8).numpy())
        piece.copy_(read)


def _only_mtp(names: set[str]) -> bool:
    return all(name.startswith("mtp.") for name in names)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no {path.name} in {path.parent}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
