"""Which path an operation takes.

Triton runs on CUDA tensors of the dtypes tensor cores take. fp64, which the parity tests use, and
everything on a CPU takes the PyTorch path. ``TRITON_INTERPRET=1``, Triton's own switch, makes its
kernels run on CPU tensors one program at a time: far too slow to train with, exactly right for
testing them.
"""

from __future__ import annotations

import os

import torch

TENSOR_CORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton was asked, before the process started, to interpret kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(*tensors: torch.Tensor) -> bool:
    """Whether these tensors go to the Triton kernels."""
    if interpreting():
        if any(x.dtype == torch.bfloat16 for x in tensors):
            raise ValueError(
                "Triton's interpreter computes garbage from bfloat16 products; use float32 or "
                "float16, or unset TRITON_INTERPRET"
            )
        return True
    return all(x.is_cuda and x.dtype in TENSOR_CORE_DTYPES for x in tensors)


def chosen_path(device: torch.device) -> list[str]:
    """What runs on this device and why, a line per choice, ready to print."""
    if use_triton(torch.empty(0, device=device)):
        return ["kernels: Triton"]
    features = torch.cpu.get_capabilities()
    bf16 = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return [
        "kernels: PyTorch, as Triton needs a CUDA GPU",
        f"  instruction set: {torch.backends.cpu.get_cpu_capability()}",
        "  window attention: blocks of the window, as a dense mask computes what it hides",
        "  experts: their own rows only, so experts without tokens cost nothing",
        "  loss: slices of logits, as all of them would not stay in cache",
        "  decoding: joined products and few operations, as each costs as much as one token's work",
        "  bf16: " + ("in hardware: half the bytes" if bf16 else "emulated: fp32 is faster"),
    ]
