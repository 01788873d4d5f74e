"""What ``kexa doctor`` prints: what will be used on this machine, and why."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import psutil

from kexa import config as configs
from kexa.config import ROOT


def report(profile: str) -> list[str]:
    """One line per fact or choice."""
    import torch

    from kexa import runtime

    config = configs.load(profile)
    machine, disk = psutil.virtual_memory(), shutil.disk_usage(ROOT)
    versions = [
        f"{name} {metadata.version(name)}"
        for name in ("torch", "triton", "transformers", "tokenizers", "papermill", "jupytext")
        if _installed(name)
    ]
    cache = Path(os.environ.get("KEXA_CACHE", "~/.cache/kexa")).expanduser()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"python {platform.python_version()}, {', '.join(versions)}",
        f"{os.cpu_count()} CPU cores, GPU: {gpu}",
        f"memory {machine.available / 2**30:.1f} of {machine.total / 2**30:.1f} GiB free",
        f"disk {disk.free / 2**30:.1f} GiB free beside the checkout",
        f"cache {cache}: {'there' if cache.is_dir() else 'empty, filled by the first run'}",
        f"profile {config.profile}:",
        *(f"  {reason}" for reason in runtime.setup(config.runtime, seed=0).reasons),
    ]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
