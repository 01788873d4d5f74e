"""The operations that decide the speed: attention, experts, head's loss, rows, FP8, decoding.

Each operation is one function. Beside it live a reference that is meant to be read
(``reference.py``, the specification the tests compare with), the path for CPUs in plain PyTorch and
the Triton kernels (``triton.py``). Which one runs follows from the tensors, never from an option:
see :func:`use_triton`.

Import order: this package knows nothing of the model; the model calls it.
"""

from kexa.kernels.attention import global_attention, window_attention
from kexa.kernels.cross_entropy import linear_cross_entropy
from kexa.kernels.decode import decode_attention
from kexa.kernels.dispatch import use_triton
from kexa.kernels.experts import expert_down, expert_up
from kexa.kernels.fp8 import (
    Scaled,
    quantize_blocks,
    quantize_rows,
    quantize_tokens,
    scaled_gemm,
    scaled_weight_gemm,
    transposed,
)
from kexa.kernels.glu import swiglu
from kexa.kernels.grouped import grouped_gemm
from kexa.kernels.norm import rms_norm
from kexa.kernels.routing import Routing, route

__all__ = [
    "Routing",
    "Scaled",
    "decode_attention",
    "expert_down",
    "expert_up",
    "global_attention",
    "grouped_gemm",
    "linear_cross_entropy",
    "quantize_blocks",
    "quantize_rows",
    "quantize_tokens",
    "rms_norm",
    "route",
    "scaled_gemm",
    "scaled_weight_gemm",
    "swiglu",
    "transposed",
    "use_triton",
    "window_attention",
]
