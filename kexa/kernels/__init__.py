"""The operations that decide the model's speed: hybrid attention, the experts' product, FP8.

Each operation is one function. Beside it live a reference that is meant to be read
(``reference.py``, the specification the tests compare with), the path for CPUs in plain PyTorch and
the Triton kernels (``triton.py``). Which one runs follows from the tensors, never from an option:
see :func:`use_triton`.

Import order: this package knows nothing of the model; the model calls it.
"""

from kexa.kernels.attention import global_attention, window_attention
from kexa.kernels.decode import decode_attention
from kexa.kernels.dispatch import use_triton
from kexa.kernels.fp8 import (
    Scaled,
    quantize_blocks,
    quantize_rows,
    quantize_tokens,
    scaled_gemm,
    scaled_weight_gemm,
    transposed,
)
from kexa.kernels.grouped import grouped_gemm

__all__ = [
    "Scaled",
    "decode_attention",
    "global_attention",
    "grouped_gemm",
    "quantize_blocks",
    "quantize_rows",
    "quantize_tokens",
    "scaled_gemm",
    "scaled_weight_gemm",
    "transposed",
    "use_triton",
    "window_attention",
]
