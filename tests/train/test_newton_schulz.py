"""The Gram form of Newton-Schulz: equal to the plain one, as stable in BF16, and what it counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kexa.train import newton_schulz, orthogonalize, orthogonalize_flops


def spectrum(name: str, m: int) -> torch.Tensor:
    """Singular values: "one K" or "many K" are K times the rest, "power P" falls by a power law."""
    kind, number = name.split()
    if kind == "power":
        return torch.arange(1, m + 1).double() ** -float(number)
    values = torch.ones(m, dtype=torch.float64)
    values[: 1 if kind == "one" else m // 16] = float(number)
    return values


def matrix(values: torch.Tensor, n: int) -> torch.Tensor:
    """[m, n] with these singular values and norm 1, in fp64."""
    generator = torch.Generator().manual_seed(0)
    m = len(values)
    u = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))[0]
    x = u @ torch.diag(values) @ v.T
    return x / x.norm()


SPECTRA = [
    *(f"one {k}" for k in (1, 10, 100, 300, 1000, 10000)),
    *(f"many {k}" for k in (3, 10, 100, 1000)),
    *(f"power {p}" for p in (0.5, 1, 2, 3)),
]


@pytest.mark.parametrize("name", SPECTRA)
def test_gram_form_equals_the_plain_form(name):
    """The same polynomial; in fp64 they differ by rounding alone."""
    x = matrix(spectrum(name, 48), 144)
    torch.testing.assert_close(
        newton_schulz.gram_form(x), newton_schulz.plain_form(x), rtol=0, atol=1e-12
    )


def test_gram_form_in_fp32_is_within_1e_6_of_a_loop_in_fp64():
    """At the least size it is used at. An entry is about 1 / sqrt(n), and so is its rounding."""
    torch.manual_seed(0)
    x = torch.randn(2, 512, 1024)
    assert newton_schulz.takes_gram_form(512, 1024)
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    expected = torch.stack([newton_schulz.plain_form(each) for each in x.double()])
    torch.testing.assert_close(newton_schulz.gram_form(x).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
def test_gram_form_in_bf16_is_as_stable_as_the_plain_form(name):
    x = matrix(spectrum(name, 96), 192)
    exact = newton_schulz.plain_form(x)
    plain = newton_schulz.plain_form(x.bfloat16()).double()
    gram = newton_schulz.gram_form(x.bfloat16()).double()
    errors = [(o - exact).norm() / exact.norm() for o in (gram, plain)]
    assert errors[0] < errors[1] + 0.05
    assert torch.linalg.matrix_norm(gram, 2) < 1.25


def test_without_a_restart_bf16_would_blow_up(monkeypatch):
    monkeypatch.setattr(newton_schulz, "RESTARTS", (5,))
    x = matrix(spectrum("one 100", 96), 192).bfloat16()
    assert torch.linalg.matrix_norm(newton_schulz.gram_form(x).double(), 2) > 2


@pytest.mark.parametrize(
    "shape",
    [(24, 16), (2, 16, 40), (512, 512), (512, 768), (512, 769), (1536, 512), (2, 512, 1024)],
)
def test_counted_operations_are_those_of_the_products(shape):
    """On the meta device: shapes only."""
    matrices = torch.Size(shape[:-2]).numel()
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(shape, device="meta"))
    assert counter.get_total_flops() == matrices * orthogonalize_flops(*shape[-2:])


def test_an_expert_of_the_published_size_takes_three_quarters_of_five_plain_steps():
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.empty(6144, 2048, device="meta"))
    with FlopCounterMode(display=False) as plain:
        newton_schulz.plain_form(torch.empty(2048, 6144, device="meta"))
    assert plain.get_total_flops() == newton_schulz.plain_flops(6144, 2048)
    assert counter.get_total_flops() <= 0.75 * plain.get_total_flops()


def test_the_form_is_the_cheaper_one_and_small_matrices_take_the_plain_one():
    assert not newton_schulz.takes_gram_form(128, 384)
    assert not newton_schulz.takes_gram_form(511, 4096)
    assert not newton_schulz.takes_gram_form(512, 768)  # n = 1.5 m: equal
    assert newton_schulz.takes_gram_form(512, 769)
    assert newton_schulz.takes_gram_form(4096, 512)


def test_large_matrices_go_through_the_gram_form():
    torch.manual_seed(0)
    x = torch.randn(1030, 512)
    plain = newton_schulz.plain_form(x.double().mT / x.double().norm()).mT
    torch.testing.assert_close(orthogonalize(x).double(), plain, rtol=0, atol=1e-5)


def test_stacks_in_one_batch_or_several_are_the_same(monkeypatch):
    torch.manual_seed(0)
    stacks = [torch.randn(shape) for shape in ((2, 8, 12), (1, 12, 8), (3, 8, 12), (1, 5, 5))]
    alone = [orthogonalize(x) for x in stacks]
    for limit in (2**27, 100):
        monkeypatch.setattr(newton_schulz, "BATCH", limit)
        for o, expected in zip(newton_schulz.orthogonalize_all(stacks), alone, strict=True):
            torch.testing.assert_close(o, expected, rtol=0, atol=1e-6)
