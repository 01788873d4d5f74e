"""Ahead-of-time compilation: what a kernel needs on a chip that is not here.

Triton and the ``ptxas`` it ships compile for any chip without a GPU. From the same :class:`Launch`
that runs on a GPU (built here from tensors on the meta device) follow registers, spilled bytes,
shared memory and the tensor-core instructions used. It says that a kernel fits and takes the fast
path; it does not say how fast it is.

Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kexa.config import ModelConfig
from kexa.kernels.attention import triton as attention
from kexa.kernels.cross_entropy import triton as cross_entropy
from kexa.kernels.decode import triton as decode
from kexa.kernels.experts import triton as experts
from kexa.kernels.fp8 import triton as fp8
from kexa.kernels.glu import triton as glu
from kexa.kernels.grouped import triton as grouped
from kexa.kernels.launch import Launch
from kexa.kernels.norm import triton as norm
from kexa.kernels.routing import triton as routing

SHARED_LIMIT = 227 * 1024  # bytes one block may use on sm_90 and sm_100
TENSOR_CORE = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the instruction that reaches full rate

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel uses on one chip. Memory in bytes; registers and spills per thread."""

    kernel: str
    capability: int
    warps: int
    registers: int
    spilled: int
    shared: int
    tensor_core: int  # occurrences of TENSOR_CORE[capability] in the PTX


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile one launch for ``sm_<capability>``, specialised as the launch itself would be."""
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(
        zip(launch.kernel.params, launch.arguments, strict=True)
    ):
        name = parameter.name
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "enable_fp_fusion": True,  # what every launch gets, said here because 3.9 warns when unsaid
    }
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(binary.asm["cubin"])
    return Compiled(
        kernel=launch.kernel.__name__.removeprefix("_"),
        capability=capability,
        warps=launch.warps,
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
        tensor_core=binary.asm["ptx"].count(TENSOR_CORE[capability]),
    )


def published_launches(tokens: int = 4096) -> Iterator[tuple[str, Launch]]:
    """Every kernel at the published shapes in bfloat16, as ``(operation, launch)``."""
    model = ModelConfig()
    H, G, K = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    bf16 = {"dtype": torch.bfloat16, "device": "meta"}
    fp32 = {"dtype": torch.float32, "device": "meta"}
    int32 = {"dtype": torch.int32, "device": "meta"}
    q = torch.empty(1, tokens, H, K, **bf16).transpose(1, 2)
    k = torch.empty(1, tokens, G, K, **bf16).transpose(1, 2)
    lse, ids = torch.empty(1, H, tokens, **fp32), torch.empty(1, tokens, **int32)
    windows = {"window attention": model.sliding_window, "global attention": tokens}
    extents = torch.empty(1, tokens // attention.BLOCK, **int32)
    for name, window in windows.items():
        reach = extents if window == tokens else None
        yield name, attention.forward_launch(q, k, k, ids, reach, q, lse, window)
        yield name, attention.backward_q_launch(q, k, k, ids, reach, q, lse, q, q, lse, window)
        yield name, attention.backward_kv_launch(q, k, k, ids, reach, lse, q, lse, k, k, window)
    yield "global attention", attention.extents_launch(ids, extents, extents)
    D, F, E = model.hidden_size, model.moe_intermediate_size, model.num_experts
    rows = tokens * model.num_experts_per_tok
    ends = torch.empty(E, **int32)
    x, y = torch.empty(rows, D, **bf16), torch.empty(rows, F, **bf16)
    w = torch.empty(E, F, D, **bf16)
    yield "grouped GEMM", grouped.rows_launch(x, w, ends, y, transpose=False)
    yield "grouped GEMM, transposed", grouped.rows_launch(y, w, ends, x, transpose=True)
    yield "grouped GEMM", grouped.weights_launch(y, x, ends, w)
    x_rows, y_rows = _fp8(rows, D, fp8.TILE), _fp8(rows, F, fp8.TILE)
    yield "FP8 quantisation", fp8.rows_launch(x, *x_rows)
    T = fp8.tiles_bound(rows, E)
    x_tokens, y_tokens = _fp8(D, T * fp8.TILE, fp8.TILE), _fp8(F, T * fp8.TILE, fp8.TILE)
    yield "FP8 quantisation", fp8.tokens_launch(x, ends, *x_tokens)
    blocks, blocks_t = (
        (
            torch.empty(E, out, inner, dtype=torch.float8_e4m3fn, device="meta"),
            torch.empty(E, out // fp8.TILE, inner // fp8.TILE, **fp32),
        )
        for out, inner in ((F, D), (D, F))
    )
    yield "FP8 quantisation", fp8.blocks_launch(w, *blocks)
    codes, turned = (part[0].view(torch.uint8) for part in (blocks, blocks_t))
    yield "FP8 quantisation", fp8.transpose_launch(codes, turned)
    one, one_end = tuple(part[:1] for part in blocks), ends[:1]
    yield "FP8 GEMM", fp8.gemm_launch(x_rows, one, one_end, y)
    yield "FP8 grouped GEMM", fp8.gemm_launch(x_rows, blocks, ends, y)
    yield "FP8 grouped GEMM, transposed", fp8.gemm_launch(y_rows, blocks_t, ends, x)
    yield "FP8 grouped GEMM", fp8.weight_gemm_launch(y_tokens, x_tokens, ends, w)
    V = model.vocab_size
    h, w = torch.empty(tokens, D, **bf16), torch.empty(V, D, **bf16)
    targets, chosen = torch.empty(tokens, **int32), torch.empty(tokens, **fp32)
    parts, weight = torch.empty(V // 128, tokens, **fp32), torch.empty((), **fp32)
    chunk, dz = w[:8192], torch.empty(tokens, 8192, **bf16)
    dh = torch.empty(tokens, D, **fp32)
    name = "linear cross-entropy"
    yield name, cross_entropy.forward_launch(h, w, targets, parts, chosen)
    yield name, cross_entropy.gradient_launch(h, chunk, targets, chosen, weight, dz, first=8192)
    yield f"{name}, dh", cross_entropy.product_launch(dz, chunk, dh)
    residual, heads = torch.empty(tokens, D, **bf16), torch.empty(tokens * H, K, **bf16)
    for name, rows_ND in {"RMSNorm": residual, "RMSNorm, heads": heads}.items():
        weight, scales = rows_ND[0], torch.empty(len(rows_ND), **fp32)
        shares = torch.empty(norm.shares(rows_ND), rows_ND.shape[1], **fp32)
        yield name, norm.forward_launch(rows_ND, weight, rows_ND, scales, model.rms_norm_eps)
        yield name, norm.backward_launch(rows_ND, weight, scales, rows_ND, rows_ND, shares)
    gate, up = torch.empty(rows, 2 * F, **bf16).chunk(2, dim=-1)
    yield "SwiGLU", glu.forward_launch(gate, up, y)
    yield "SwiGLU", glu.backward_launch(gate, up, y, y, y)
    yield from _experts(tokens, model)
    scores, top_k = torch.empty(tokens, E, **fp32), model.num_experts_per_tok
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    gates, pairs = torch.empty(tokens, top_k, **fp32), chosen.flatten()
    R = routing.tile_tokens(scores)
    counts = torch.empty(tokens // R, E, **int32)
    weights = (model.norm_topk_prob, model.routed_scaling_factor)
    yield "routing", routing.select_launch(scores, scores, chosen, gates, counts, *weights)
    yield "routing", routing.scan_launch(counts, counts, ends)
    yield "routing", routing.place_launch(chosen, counts, ends, pairs, pairs, ends, R)
    yield "routing", routing.backward_launch(scores, chosen, gates, scores, *weights)
    rows, drafted = 16, 8  # a batch being decoded, as many tokens each as a cache takes
    q = torch.empty(rows, drafted, H, K, **bf16).transpose(1, 2)
    position = torch.empty(rows, drafted, dtype=torch.int64, device="meta")
    for slots, window in ((model.sliding_window + 8, model.sliding_window), (65536, None)):
        k = torch.empty(rows, G, slots, K, **bf16)
        o, lse = decode.buffers(q, slots, window)
        yield (
            "decode attention",
            decode.attend_launch(q, k, k, position, position[:, 0], o, lse, window),
        )
    yield "decode attention", decode.combine_launch(o, lse, q)


def _experts(tokens: int, model: ModelConfig) -> Iterator[tuple[str, Launch]]:
    """Both products of the experts, forward and backward."""
    D, F, E, K = (
        model.hidden_size,
        model.moe_intermediate_size,
        model.num_experts,
        model.num_experts_per_tok,
    )
    bf16 = {"dtype": torch.bfloat16, "device": "meta"}
    x, h = torch.empty(tokens, D, **bf16), torch.empty(tokens * K, F, **bf16)
    gate_up, pairs = torch.empty(tokens * K, 2 * F, **bf16), torch.empty(tokens * K, D, **bf16)
    w_up, w_down = torch.empty(E, 2 * F, D, **bf16), torch.empty(E, D, F, **bf16)
    gates = torch.empty(tokens, K, device="meta")
    order = torch.empty(tokens * K, dtype=torch.int64, device="meta")
    ends = torch.empty(E, dtype=torch.int32, device="meta")
    places = order, ends
    parts = torch.empty(F // 128, tokens * K, device="meta")
    up, down = "experts' up product", "experts' down product"
    yield up, experts.up_launch(x, w_up, *places, gate_up, h, K)
    yield f"{up}, inference", experts.up_launch(x, w_up, *places, None, h, K)
    yield f"{up}, dx", experts.scatter_launch(gate_up, w_up, None, *places, pairs, transpose=True)
    yield f"{up}, dw", experts.weights_launch(gate_up, x, None, *places, w_up, K, transpose=False)
    yield down, experts.scatter_launch(h, w_down, gates, *places, pairs, transpose=False)
    yield f"{down}, dh", experts.back_launch(x, w_down, h, gates, *places, h, parts)
    yield f"{down}, dw", experts.weights_launch(h, x, gates, *places, w_down, K, transpose=True)


def _fp8(rows: int, columns: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one operand on the meta device."""
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta")
    return codes, torch.empty(columns // tile, rows, device="meta")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes per thread, as the toolchain's own dump states them."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
