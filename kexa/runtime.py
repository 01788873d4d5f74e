"""Device, dtype, seed and thread policy, each with its reason.

Equal seeds give equal bits on one machine: threads are fixed by the profile (a different thread
count sums in a different order) and torch is asked for deterministic algorithms.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass

import numpy as np
import torch

from kexa.config import ConfigError, RuntimeConfig


@dataclass(frozen=True)
class Runtime:
    """What was chosen, and why; ``reasons`` is one line per choice, ready to print."""

    device: torch.device
    compute_dtype: torch.dtype
    has_fp8: bool
    reasons: tuple[str, ...]


def setup(config: RuntimeConfig, seed: int) -> Runtime:
    """Apply the thread and seed policy to this process and choose device and dtype."""
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=False)
    # Every operation writes all of its output; filling it first would cost a sixth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seed_everything(seed)
    device = device_of(config)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    fp8 = has_fp8(device)
    reasons = (
        f"device {device}: " + ("torch sees a GPU" if on_gpu else "no GPU asked for or found"),
        f"compute dtype {str(dtype).removeprefix('torch.')}: "
        + ("tensor cores take bfloat16" if on_gpu else "fp32 is the fast dtype of this CPU path"),
        "FP8 in hardware: compute capability 8.9 or newer"
        if fp8
        else "FP8 emulated: hardware has it from compute capability 8.9",
        f"threads {config.threads}: fixed by the profile so that results repeat",
        f"seed {seed}",
    )
    return Runtime(device, dtype, fp8, reasons)


def has_fp8(device: torch.device) -> bool:
    """Whether this device multiplies FP8 in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def device_of(config: RuntimeConfig) -> torch.device:
    """The device that ``config`` asks for.

    Raises:
        ConfigError: an unknown name, or "cuda" where torch sees no GPU.
    """
    cuda = torch.cuda.is_available()
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"runtime.device={config.device!r}; use 'auto', 'cpu' or 'cuda'")
    if config.device == "cuda" and not cuda:
        raise ConfigError("runtime.device='cuda' but torch sees no GPU; set 'auto' or 'cpu'")
    return torch.device("cuda" if cuda and config.device != "cpu" else "cpu")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one named purpose, independent of every other name and of call order."""
    digest = np.random.SeedSequence([seed, *(_number(n) for n in names)]).generate_state(2)
    return torch.Generator().manual_seed(int(digest[0]) << 31 ^ int(digest[1]))


def _number(name: str | int) -> int:
    if isinstance(name, int):
        return name
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
