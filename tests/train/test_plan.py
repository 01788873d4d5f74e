"""The planner: sizes against real models, the walk against the allocator, traffic by hand."""

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import BASE, CASES, TOLERANCE, compare
from kexa import dist
from kexa.__main__ import main
from kexa.config import ConfigError, load
from kexa.kernels.cross_entropy import sliced
from kexa.model import KexaForCausalLM
from kexa.train import build_optimizers, plan, set_numerics
from kexa.train.memory import memory, parameters
from kexa.train.operations import Work
from kexa.train.plan import GIB, best, launch_line, plans, report, table
from tests.train.conftest import CONFIG, OPTIMIZATION

FULL = load("full")


@pytest.mark.parametrize("name", ["small", "many rows", "recomputed"])
def test_prediction_is_within_a_tenth_of_the_allocator(name):
    line = compare(one_case(name))
    assert abs(line["error"]) <= TOLERANCE
    assert line["peak_bytes"] > 5 * line["states_bytes"]  # activations decide, not parameters


@pytest.mark.parametrize("bf16_products", [True, False])
def test_what_the_head_holds_is_predicted_within_a_hundredth(monkeypatch, bf16_products):
    monkeypatch.setattr(sliced, "has_bf16_products", lambda: bf16_products)
    line = compare(one_case("wide vocabulary"))
    assert line["at"] == "head, loss, forward"
    assert abs(line["error"]) <= 0.01


def test_what_muon_holds_is_predicted_within_a_hundredth():
    line = compare(one_case("few tokens"))
    assert line["at"] == "Muon"
    assert abs(line["error"]) <= 0.01


def one_case(name):
    (case,) = [case for case in CASES if case.name == name]
    return case


@pytest.mark.parametrize("numerics", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_nextn_predict_layers": 1, "first_k_dense_replace": 2},
        {"use_qk_norm": False, "rope_layers": "all", "vocab_size": 300},
    ],
)
def test_activations_are_what_autograd_saves(numerics, change):
    """Counted with hooks: every storage that autograd holds after the forward pass."""
    config = replace(BASE, **change)
    model = KexaForCausalLM(config)
    set_numerics(model, numerics)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(config.vocab_size, (2, 300))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model.loss(ids, torch.zeros_like(ids))
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    predicted = memory(config, Work(2, 300, numerics)).activations
    assert predicted == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize(
    "config", [CONFIG, BASE, replace(BASE, tie_word_embeddings=True, use_qk_norm=False)]
)
def test_parameters_are_those_of_the_optimizers(config):
    muon, adamw = build_optimizers(KexaForCausalLM(config), OPTIMIZATION)
    found = parameters(config)
    for optimizer, count in ((muon, found.muon), (adamw, found.adamw)):
        groups = optimizer.param_groups
        assert count == sum(p.numel() for group in groups for p in group["params"])


def test_states_in_host_memory_are_not_on_the_device():
    here, away = (
        plan.plan(FULL.model, FULL.pretrain, 4, 16, 1, True, offload).memory
        for offload in (False, True)
    )
    assert away.host == here.momentum + here.moments > 0 == here.host
    assert away.saved == here.saved == here.states
    assert here.states - away.states == away.host
    assert here.peak - away.peak == pytest.approx(away.host)  # a layer decides
    short = replace(BASE, vocab_size=64)  # optimizers decide
    here, away = (memory(short, Work(1, 8), offload=offload) for offload in (False, True))
    assert here.where == away.where == "Muon"
    assert here.peak - away.peak == away.moments


def test_a_rank_holds_whole_experts():
    """Of 128 experts over 256 ranks half hold one, and none holds half of one."""
    wide, full = (memory(FULL.model, Work(1, 128), 1, 256, n) for n in (256, 128))
    assert wide.parameters == full.parameters


def test_published_model():
    found = parameters(FULL.model)
    routers = 47 * 128  # their correction bias is not trained
    assert found.adamw + found.muon == 236_571_156_352 + 528_513_280 - routers
    assert found.experts == 47 * 128 * 3 * 6144 * 2048


def test_states_are_shared_evenly():
    whole = memory(FULL.model, Work(1, 128, "fp8", "cuda"))
    part = memory(
        FULL.model, Work(1, 128, "fp8", "cuda", expert_ranks=8), dense_ranks=64, expert_shards=8
    )
    assert whole.states == 64 * part.states
    assert whole.gradients == 64 * part.gradients


def test_recomputation_holds_less_and_computes_more():
    kept, again = (plan.plan(FULL.model, FULL.pretrain, 8, 8, 1, r) for r in (False, True))
    assert again.memory.peak < kept.memory.peak / 4
    assert 1.25 < again.flops / kept.flops < 4 / 3
    assert again.traffic.exchange == kept.traffic.exchange * 1.5
    assert again.traffic.gather == kept.traffic.gather


def test_traffic_by_hand():
    """Two ranks along each axis of the tiny model: all four on one machine."""
    tiny = replace(FULL.pretrain, batch_size=8, accumulate=1, sequence_length=16, numerics="fp32")
    found = plan.plan(CONFIG, tiny, fsdp=2, ep=2, rows=1).traffic
    assert plan.plan(CONFIG, tiny, 2, 2, 1).accumulate == 2
    experts = 3 * 4 * 3 * 16 * 8 // 2  # of one place along "ep": layers, E, matrices, D, F
    tables = 2 * 64 * 16 + 16  # embedding, head and norm: gathered once
    trained = parameters(CONFIG)
    rest = trained.adamw + trained.muon - trained.experts - tables
    assert found.gather == 2 * 4 * ((tables + 2 * rest) * 3 / 4 + 2 * experts / 2)
    assert found.scatter == 2 * 4 * ((tables + rest) * 3 / 4 + experts / 2)
    # 16 tokens of 2 pairs, 16 numbers each, to experts and back, twice; half of them stay
    assert found.exchange == 2 * 4 * (3 * 16 * 2 * 16 * 2 * 2) / 2
    assert found.across == 0


def test_an_exchange_within_a_machine_crosses_none():
    inside, beyond = (plan.plan(FULL.model, FULL.pretrain, 64 // ep, ep) for ep in (8, 16))
    rows = 4 * 8192 * 8 * 6144 * 47 * 4 * 64
    assert inside.traffic.exchange == rows * 7 / 8
    assert beyond.traffic.exchange == rows * 15 / 16
    assert beyond.traffic.across > rows * 8 / 16  # half of sixteen ranks sit elsewhere


def test_more_rows_gather_less_often():
    one, two = (plan.plan(FULL.model, FULL.pretrain, 8, 8, rows, True) for rows in (1, 2))
    assert two.traffic.gather == one.traffic.gather / 2
    assert two.traffic.exchange == one.traffic.exchange
    assert two.memory.peak > one.memory.peak


def test_layouts_of_64_ranks():
    found = plans(FULL.model, FULL.pretrain, 64, 80 * GIB)
    assert {(x.fsdp, x.ep) for x in found} == {(64 // n, n) for n in (1, 2, 4, 8, 16, 32, 64)}
    assert all(x.rows * x.accumulate * 64 == FULL.pretrain.batch_size for x in found)
    assert len(table(found)) == len(found) + 1
    assert best(found, 0) is None
    roomy = best(found, 1000 * GIB)
    assert roomy.traffic.cost == min(x.traffic.cost for x in found)


def test_the_published_model_fits_64_gpus_of_80_gib():
    """Under "ep" of 16 and more, recomputed, with the optimizers' states in host memory."""
    found = plans(FULL.model, FULL.pretrain, 64, 80 * GIB)
    fitting = [(x.fsdp, x.ep) for x in found if x.fits(80 * GIB)]
    assert fitting == [(4, 16), (2, 32), (1, 64)]
    assert all(x.recompute and x.offload for x in found if x.fits(80 * GIB))
    assert not any(x.offload for x in plans(FULL.model, FULL.pretrain, 64, 1000 * GIB))


def test_only_meshes_that_run_are_listed():
    for ranks in (64, 256):
        for x in plans(FULL.model, FULL.pretrain, ranks, 80 * GIB):
            dist.check(x.fsdp, x.ep, ranks, FULL.model.num_experts)


def test_launch_line():
    line = launch_line(plan.plan(FULL.model, FULL.pretrain, 8, 8, 1, True), "full")
    assert line.startswith("torchrun --nnodes 8 --nproc-per-node 8 ")
    assert (
        "-m kexa.train --profile full --fsdp 8 --ep 8 --out DIR --tokenizer DIR/tokenizer " in line
    )
    assert "--set pretrain.accumulate=64 --set pretrain.recompute=true" in line
    assert line.endswith("--set pretrain.offload_optimizer=false")
    one = launch_line(plan.plan(FULL.model, FULL.pretrain, 1, 1), "full")
    assert one.startswith("torchrun --nproc-per-node 1 -m kexa.train") and "DIR" not in one


def test_report_says_what_fits_or_how_many_would():
    lines = list(report(FULL, "full", 64, 1000 * GIB))
    assert "of 14 fit 90% of 1000 GiB" in "\n".join(lines)
    assert lines[-1].startswith("torchrun --nnodes 8")
    assert lines[-2].startswith("host memory of each of its ranks: 0.0 GiB, and 27.7 more")
    lines = list(report(FULL, "full", 16, 80 * GIB))
    assert any(line.startswith("none of them fits") for line in lines)
    assert any(line.endswith("GPUs would do:") for line in lines)
    assert lines[-1].startswith("torchrun")
    assert "use shorter rows" in list(report(FULL, "full", 4096, GIB))[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fsdp": 1, "ep": 3}, "fsdp 1 x ep 3 does not divide 128 experts"),
        ({"fsdp": 16, "ep": 16}, "fsdp 16 x ep 16 does not divide 128 experts"),
        ({"fsdp": 3, "ep": 1}, "does not split over 3 ranks with 1 rows"),
        ({"fsdp": 0, "ep": 1}, "fsdp=0, ep=1, rows=1: each must be at least 1"),
    ],
)
def test_what_does_not_divide_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan.plan(FULL.model, FULL.pretrain, **arguments)


def test_command(capsys):
    assert main(["plan", "--profile", "smoke", "--gpus", "1", "--memory", "24"]) == 0
    assert "torchrun --nproc-per-node 1 -m kexa.train --profile smoke" in capsys.readouterr().out
    assert main(["plan", "--gpus", "48"]) == 2
    assert "48 GPUs do not divide pretrain.batch_size=4096" in capsys.readouterr().err
