"""On a GPU: the kernels in their own dtype, judged by PyTorch's own error in that dtype."""

from __future__ import annotations

import pytest
import torch

from kexa.config import load
from kexa.kernels import (
    Routing,
    decode_attention,
    expert_down,
    expert_up,
    fp8,
    global_attention,
    grouped_gemm,
    linear_cross_entropy,
    rms_norm,
    route,
    swiglu,
    window_attention,
)
from kexa.kernels.attention import reference as attention_reference
from kexa.kernels.check import check, compare
from kexa.kernels.cross_entropy import reference as cross_entropy_reference
from kexa.kernels.decode import reference as decode_reference
from kexa.kernels.experts import reference as experts_reference
from kexa.kernels.fp8 import emulated
from kexa.kernels.fp8 import reference as fp8_reference
from kexa.kernels.glu import reference as glu_reference
from kexa.kernels.grouped import reference as grouped_reference
from kexa.kernels.norm import reference as norm_reference
from kexa.kernels.routing import reference as routing_reference
from kexa.model import KexaForCausalLM
from kexa.model import attention as model_attention
from kexa.model.moe import SparseMoE
from kexa.train.fp8 import fp8_grouped_gemm, fp8_matmul, set_numerics
from tests.kernels import decode_checks, fp8_checks, rows_checks

pytestmark = pytest.mark.gpu


def assert_as_exact_as_pytorch(op, plain, inputs, d_out, resolution=0.0):
    """``resolution``: what fp32 sums of the inputs resolve, where they cancel to an exact zero."""
    errors, allowed = compare(op, plain, inputs, d_out)
    assert all(errors[n] <= max(allowed[n], resolution) for n in errors), (errors, allowed)


@pytest.mark.parametrize("tokens", [1, 63, 129, 1000])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("window", [128, None], ids=["window", "global"])
def test_attention_is_as_exact_as_pytorch(tokens, head_dim, window):
    torch.manual_seed(0)
    draw = {"dtype": torch.bfloat16, "device": "cuda"}
    inputs = [torch.randn(2, n, tokens, head_dim, **draw) for n in (8, 2, 2)]
    ids = torch.randint(-1, 4, (2, tokens), device="cuda").sort(1).values

    def op(q, k, v):
        if window is None:
            return global_attention(q, k, v, ids)
        return window_attention(q, k, v, window, ids)

    def plain(q, k, v):
        return attention_reference.attention(q, k, v, window, ids)

    # Of a single key the gradients of q and k are the difference of two equal sums over the head.
    resolution = head_dim * torch.finfo(torch.float32).eps
    assert_as_exact_as_pytorch(op, plain, inputs, torch.randn_like(inputs[0]), resolution)


@pytest.mark.parametrize("ends", [(0, 1, 1), (100, 100, 257), (1, 2, 1000)])
@pytest.mark.parametrize("features", [(64, 128), (200, 328)])
def test_grouped_gemm_is_as_exact_as_pytorch(ends, features):
    torch.manual_seed(0)
    draw = {"dtype": torch.bfloat16, "device": "cuda"}
    D, F = features
    x, w = torch.randn(ends[-1], D, **draw), torch.randn(len(ends), F, D, **draw)
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    assert_as_exact_as_pytorch(
        lambda x, w: grouped_gemm(x, w, offsets),
        lambda x, w: grouped_reference.grouped_gemm(x, w, offsets),
        [x, w],
        torch.randn(ends[-1], F, **draw),
    )


@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("features", [(64, 128), (200, 328)])
def test_experts_are_as_exact_as_pytorch(tokens, features):
    """Eight experts, of which the first and the last get nothing."""
    torch.manual_seed(0)
    draw = {"dtype": torch.bfloat16, "device": "cuda"}
    D, F = features
    keys = torch.rand(tokens, 8, device="cuda")
    keys[:, [0, 7]] = -torch.inf
    routing = Routing(*routing_reference.route(keys, keys, 3, False, 1.0))
    x, h = torch.randn(tokens, D, **draw), torch.randn(3 * tokens, F, **draw)
    w_up, w_down = torch.randn(8, 2 * F, D, **draw), torch.randn(8, D, F, **draw)
    plain = grouped_reference.grouped_gemm
    assert_as_exact_as_pytorch(
        lambda x, w: expert_up(x, w, routing),
        lambda x, w: experts_reference.expert_up(x, w, routing, plain),
        [x, w_up],
        torch.randn(3 * tokens, F, **draw),
    )

    def down(function, *product):
        def apply(h, w, gates):
            return function(h, w, routing._replace(gates_NK=gates), *product)

        return apply

    assert_as_exact_as_pytorch(
        down(expert_down),
        down(experts_reference.expert_down, plain),
        [h, w_down, torch.randn(tokens, 3, **draw)],
        torch.randn(tokens, D, **draw),
    )


@pytest.mark.parametrize("rows", [1, 63, 1000])
@pytest.mark.parametrize("features, words", [(64, 100), (328, 20_000)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_linear_cross_entropy_is_as_exact_as_pytorch(rows, features, words, z_loss):
    torch.manual_seed(0)
    draw = {"dtype": torch.bfloat16, "device": "cuda"}
    h, w = torch.randn(rows, features, **draw), torch.randn(words, features, **draw)
    targets = torch.randint(0, words, (rows,), device="cuda")
    assert_as_exact_as_pytorch(
        lambda h, w: linear_cross_entropy(h, w, targets, z_loss),
        lambda h, w: cross_entropy_reference.linear_cross_entropy(h, w, targets, z_loss),
        [h, w],
        torch.tensor(0.75, device="cuda"),
    )


def test_cross_entropy_over_the_published_vocabulary_stores_no_logits():
    """Beside the gradients: dz of a chunk and dh in fp32, an eighth of the logits in fp32."""
    N, D, V = 4096, 6144, 153_600
    draw = {"dtype": torch.bfloat16, "device": "cuda"}
    h = torch.randn(N, D, **draw).requires_grad_()
    w = (torch.randn(V, D, **draw) / D**0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(h, w, targets)
    loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used - 2 * (h.numel() + w.numel()) < 4 * N * V / 8
    exact = sum(
        cross_entropy_reference.linear_cross_entropy(x.float(), w.detach().float(), y)
        for x, y in zip(h.detach().split(512), targets.split(512), strict=True)
    )
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-5)


def test_no_call_waits_for_the_gpu():
    draw = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    q, k, v = (torch.randn(1, n, 256, 128, **draw) for n in (4, 2, 2))
    x, w = torch.randn(256, 64, **draw), torch.randn(4, 64, 64, **draw)
    ends = torch.tensor([10, 10, 200, 256], dtype=torch.int32, device="cuda")
    targets = torch.arange(256, device="cuda") % 64
    weight_o, weight_y = torch.randn_like(q), torch.randn_like(x)
    scores = torch.rand(256, 8, device="cuda", requires_grad=True)
    w_up, w_down = torch.randn(8, 64, 64, **draw), torch.randn(8, 64, 32, **draw)
    for mode in ("default", "error"):  # the first pass compiles, which may wait
        torch.cuda.set_sync_debug_mode(mode)
        window_attention(q, k, v, 128).backward(weight_o)
        grouped_gemm(x, w, ends).backward(weight_y)
        linear_cross_entropy(x, w[0], targets).backward()
        rms_norm(q, q[0, 0, 0], 1e-5).backward(weight_o)
        swiglu(x, x).backward(weight_y)
        routing = route(scores, scores.detach(), 2, True, 2.5)
        h = expert_up(x, w_up, routing)
        expert_down(h, w_down, routing).backward(weight_y)
        torch.cuda.set_sync_debug_mode("default")


def test_a_mixture_of_experts_never_waits_for_the_gpu():
    torch.manual_seed(0)
    layer = SparseMoE(load("smoke").model)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    layer = layer.to("cuda", torch.bfloat16).train()
    width = layer.gate.weight.shape[1]
    x, dy = torch.randn(2, 2, 65, width, dtype=torch.bfloat16, device="cuda")
    for mode in ("default", "error"):  # the first pass compiles, which may wait
        torch.cuda.set_sync_debug_mode(mode)
        layer(x.requires_grad_()).backward(dy)
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_equal_inputs_give_equal_bits():
    draw = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    q, k, v = (torch.randn(2, n, 777, 128, **draw) for n in (8, 2, 2))
    d_out = torch.randn_like(q)
    runs = [torch.autograd.grad(window_attention(q, k, v, 128), (q, k, v), d_out) for _ in range(3)]
    h, w = torch.randn(300, 128, **draw), torch.randn(20_000, 128, **draw)
    targets = torch.arange(300, device="cuda")
    losses = [linear_cross_entropy(h, w, targets) for _ in range(3)]
    others = [torch.autograd.grad(loss, (h, w)) for loss in losses]
    x, gates = torch.randn(300, 128, **draw), torch.rand(300, 3, device="cuda", requires_grad=True)
    w_up, w_down = torch.randn(8, 512, 128, **draw), torch.randn(8, 128, 256, **draw)
    keys, leaves = torch.rand(300, 8, device="cuda"), (x, gates, w_up, w_down)
    routing = route(keys, keys, 3, True, 1.0)._replace(gates_NK=gates)
    mixed = [expert_down(expert_up(x, w_up, routing), w_down, routing) for _ in range(3)]
    mixtures = [(y, *torch.autograd.grad(y, leaves, torch.ones_like(y))) for y in mixed]
    for results in (runs, others, mixtures):
        for run in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], run, strict=True))


def test_weights_past_two_billion_numbers():
    E, F, D = 128, 4096, 6144  # the published expert stack: 3.2e9 numbers
    w = torch.zeros(E, F, D, dtype=torch.bfloat16, device="cuda")
    w[-1] = 1
    x = torch.ones(5, D, dtype=torch.bfloat16, device="cuda")
    ends = torch.zeros(E, dtype=torch.int32, device="cuda")
    ends[-1] = 5
    assert bool((grouped_gemm(x, w, ends) == D).all())
    last = torch.full((5, 1), E - 1, device="cuda")
    order = torch.arange(5, device="cuda")
    routing = Routing(last, torch.ones(5, 1, device="cuda"), order, order, ends)
    with torch.no_grad():
        assert bool((expert_up(x, w, routing) == float(D) * D).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", fp8_checks.CASES)
def test_fp8_codes_equal_the_emulation_bit_for_bit(case, dtype):
    x, w, _, offsets = fp8_checks.inputs(case)
    for name, arguments in (
        ("quantize_rows", (x.to(dtype),)),
        ("quantize_tokens", (x.to(dtype), offsets)),
        ("quantize_blocks", (w.to(dtype),)),
    ):
        ours = getattr(fp8, name)(*(t.cuda() for t in arguments))
        codes, scales = getattr(fp8_reference, name)(*arguments)
        expected = codes.view(torch.uint8).numpy(), scales.numpy()
        fp8_checks.assert_same_bits(fp8.Scaled(*(t.cpu() for t in ours)), expected, case)


@pytest.mark.parametrize("case", fp8_checks.CASES)
def test_fp8_emulation_on_the_gpu_equals_the_one_on_the_cpu(case):
    x, w, _, _ = fp8_checks.inputs(case)
    for values, rows in ((x, 1), (w, emulated.TILE)):
        on_gpu = emulated.quantize(values.cuda(), rows, emulated.TILE).cpu()
        torch.testing.assert_close(
            on_gpu, emulated.quantize(values, rows, emulated.TILE), rtol=0, atol=0, equal_nan=True
        )


def test_fp8_products_are_as_exact_as_pytorch():
    result = check("FP8 GEMM", "cuda", torch.bfloat16)
    assert result.holds and result.path == "triton", result


@pytest.mark.parametrize("ends", [(257,), (0, 1, 1), (100, 100, 257), (1, 2, 1000)])
@pytest.mark.parametrize("features", [(64, 128), (200, 328), (1024, 512)])
def test_fp8_training_follows_the_emulation(ends, features):
    D, F = features
    x, dy = fp8_checks.normal(ends[-1], D, seed=0), fp8_checks.normal(ends[-1], F, seed=1)
    w, offsets = fp8_checks.normal(len(ends), F, D, seed=2), torch.tensor(ends).int()
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, w)]
        y = fp8_grouped_gemm(*leaves, offsets.to(device))
        results.append((y, *torch.autograd.grad(y, leaves, dy.to(device))))
    assert results[1][0].grad_fn.name() == "_Fp8KernelsBackward"
    for expected, ours in zip(*results, strict=True):  # a BF16 rounding, and the chip's short sums
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(ours.cpu(), expected, rtol=2**-7, atol=1e-3 * largest)


@pytest.mark.parametrize("numerics, attention", [("fp8", torch.bfloat16), ("fp32", torch.float32)])
def test_a_numerics_policy_says_what_attention_reads_on_a_gpu(numerics, attention, monkeypatch):
    model = KexaForCausalLM(load("smoke").model).cuda()
    set_numerics(model, numerics)
    seen = []
    for name in ("window_attention", "global_attention"):
        original = getattr(model_attention, name)
        monkeypatch.setattr(
            model_attention,
            name,
            lambda q, *rest, f=original: (seen.append(q.dtype), f(q, *rest))[1],
        )
    logits = model(torch.arange(40, device="cuda")[None])
    assert set(seen) == {attention} and len(seen) == len(model.model.layers)
    assert logits.dtype == torch.float32


def test_fp8_never_waits_for_the_gpu_and_repeats_its_bits():
    draw = {"dtype": torch.bfloat16, "device": "cuda", "requires_grad": True}
    x, w, w_EFD = (torch.randn(s, **draw) for s in ((300, 256), (128, 256), (4, 128, 256)))
    ends = torch.tensor([10, 10, 200, 300], dtype=torch.int32, device="cuda")
    dy = torch.randn(300, 128, dtype=torch.bfloat16, device="cuda")
    runs = []
    for mode in ("default", "error", "error"):  # the first pass compiles, which may wait
        torch.cuda.set_sync_debug_mode(mode)
        dense, grouped = fp8_matmul(x, w), fp8_grouped_gemm(x, w_EFD, ends)
        gradients = torch.autograd.grad((dense, grouped), (x, w, w_EFD), (dy, dy))
        runs.append((dense, grouped, *gradients))
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("case", decode_checks.CASES)
def test_decode_attention_is_as_exact_as_pytorch(case):
    *inputs, position, start, window = decode_checks.inputs(case, torch.bfloat16)
    inputs = [x.nan_to_num().cuda() for x in inputs]
    position, start = position.cuda(), start.cuda()
    mask = decode_reference.visible_slots(position, start, inputs[1].shape[2], window)

    @torch.no_grad()
    def op(q, k, v):
        return decode_attention(q, k, v, position, start, window)

    def plain(q, k, v):
        return decode_reference.decode_attention(q, k, v, mask)

    assert_as_exact_as_pytorch(op, plain, inputs, None)


@pytest.mark.parametrize("case", decode_checks.CASES)
def test_decode_attention_reads_no_slot_that_nobody_sees(case):
    arguments = decode_checks.inputs(case, torch.bfloat16)
    arguments = [x.cuda() if torch.is_tensor(x) else x for x in arguments]
    for mode in ("default", "error"):  # the first pass compiles, which may wait
        torch.cuda.set_sync_debug_mode(mode)
        out = decode_attention(*arguments)
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()


@pytest.mark.parametrize("rows, features", [(1, 128), (63, 100), (1000, 6144), (40000, 128)])
def test_rms_norm_is_as_exact_as_pytorch(rows, features):
    torch.manual_seed(0)
    x, w, d_out = (
        torch.randn(*s, features, dtype=torch.bfloat16, device="cuda")
        for s in ((rows,), (), (rows,))
    )
    assert_as_exact_as_pytorch(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: norm_reference.rms_norm(x, w, 1e-5),
        [x, w],
        d_out,
    )


@pytest.mark.parametrize("rows, features", [(1, 1), (63, 100), (1000, 2048), (257, 18432)])
def test_swiglu_is_as_exact_as_pytorch(rows, features):
    torch.manual_seed(0)
    gate, up, d_out = torch.randn(3, rows, features, dtype=torch.bfloat16, device="cuda")
    assert_as_exact_as_pytorch(swiglu, glu_reference.swiglu, [gate, up], d_out)


@pytest.mark.parametrize("case", rows_checks.ROUTING_CASES | rows_checks.LARGE_ROUTING_CASES)
def test_routing_equals_its_definition(case):
    def on_gpu(scores, keys, *arguments):
        return [part.cpu() for part in route(scores.cuda(), keys.cuda(), *arguments)]

    rows_checks.check_routing(on_gpu, case, torch.float32, 1e-5, lowest=True)
