"""What ``kexa doctor`` prints: what will be used on this machine, and why."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata

import psutil

from kexa import config as configs
from kexa.config import ROOT


def report(profile: str) -> list[str]:
    """One line per fact or choice."""
    import torch

    from kexa import runtime
    from kexa.data.sources import cache_dir
    from kexa.kernels.dispatch import chosen_path

    config = configs.load(profile)
    machine, disk = psutil.virtual_memory(), shutil.disk_usage(ROOT)
    versions = [
        f"{name} {metadata.version(name)}"
        for name in ("torch", "triton", "transformers", "tokenizers", "papermill", "jupytext")
        if _installed(name)
    ]
    cache = cache_dir()
    chosen = runtime.setup(config.runtime, seed=0)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"python {platform.python_version()}, {', '.join(versions)}",
        f"{os.cpu_count()} CPU cores, GPU: {gpu}",
        f"memory {machine.available / 2**30:.1f} of {machine.total / 2**30:.1f} GiB free",
        f"disk {disk.free / 2**30:.1f} GiB free beside the checkout",
        f"cache {cache}: {'there' if cache.is_dir() else 'empty, filled by the first run'}",
        f"profile {config.profile}:",
        *(f"  {reason}" for reason in chosen.reasons),
        *(f"  {choice}" for choice in chosen_path(chosen.device)),
    ]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
