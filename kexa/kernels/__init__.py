"""The operations that decide the model's speed: attention, experts, head's loss, what is between.

Each operation is one function. Beside it live a reference that is meant to be read
(``reference.py``, the specification the tests compare with), the path for CPUs in plain PyTorch and
the Triton kernels (``triton.py``). Which one runs follows from the tensors, never from an option:
see :func:`use_triton`.

Import order: this package knows nothing of the model; the model calls it.
"""

from kexa.kernels.attention import global_attention, window_attention
from kexa.kernels.cross_entropy import linear_cross_entropy
from kexa.kernels.dispatch import use_triton
from kexa.kernels.glu import swiglu
from kexa.kernels.grouped import grouped_gemm
from kexa.kernels.norm import rms_norm
from kexa.kernels.routing import Routing, route

__all__ = [
    "Routing",
    "global_attention",
    "grouped_gemm",
    "linear_cross_entropy",
    "rms_norm",
    "route",
    "swiglu",
    "use_triton",
    "window_attention",
]
