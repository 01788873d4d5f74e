"""Nested state apart: its tensors by name, and all the rest with marks in their places.

What a checkpoint stores as two files, because tensors are sharded and plain values are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

TENSOR = "kexa:tensor"  # {TENSOR: key} stands for the tensor of that key


def take_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with a marker for each tensor, which goes to ``tensors``.

    Args:
        key: what the names of its tensors begin with.
    """
    if isinstance(value, Tensor):
        tensors[key] = value.detach()
        return {TENSOR: key}
    if isinstance(value, Mapping):
        return {k: take_tensors(v, f"{key}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_tensors(v, f"{key}/{i}", tensors) for i, v in enumerate(value))
    return value


def put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`take_tensors`."""
    if isinstance(value, dict):
        if TENSOR in value:
            return tensors[value[TENSOR]]
        return {k: put_tensors(v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(put_tensors(v, tensors) for v in value)
    return value


def tensor_paths(value: Any, path: tuple) -> Iterator[tuple[str, tuple]]:
    """Key and path, the dict keys and list places around it, of every marker in ``value``."""
    if isinstance(value, dict) and TENSOR in value:
        yield value[TENSOR], path
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from tensor_paths(v, (*path, k))
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from tensor_paths(v, (*path, i))
