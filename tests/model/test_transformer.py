"""The whole model: packing, padding, losses by hand, what each switch removes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

PACKED = [7, 1, 13, 2, 9]  # document lengths of the packed row


def packed_documents(lengths):
    return torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])


def test_logits_do_not_depend_on_later_tokens(build, ids):
    model, x = build(), ids(2, 20)
    changed = x.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    moved = (model(x) - model(changed)).abs().amax(dim=(0, 2))
    assert moved[:12].max() < 1e-5 < 1e-2 < moved[12:].min()


def test_a_window_layer_forgets_and_a_global_layer_does_not(build, ids):
    x = ids(1, 24)
    changed = x.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 61
    # Three window layers of 5 keys look back at most 3 * 4 tokens.
    windows = build(sliding_window_pattern="L", num_hidden_layers=3)
    moved = (windows(x) - windows(changed)).abs().amax(-1)[0]
    assert moved[13:].max() < 1e-5 < 1e-4 < moved[12]
    hybrid = build(sliding_window_pattern="LLG", num_hidden_layers=3)
    assert (hybrid(x) - hybrid(changed))[0, -1].abs().max() > 1e-4


def test_packed_documents_equal_separate_runs(build, ids):
    model, x = build(torch.float64), ids(1, sum(PACKED))
    packed = model(x, packed_documents(PACKED)).split(PACKED, dim=1)
    for document, logits in zip(x.split(PACKED, dim=1), packed, strict=True):
        # The norms take their statistics in fp32, which bounds the agreement.
        torch.testing.assert_close(logits, model(document), atol=2e-6, rtol=0)


def test_left_padding_changes_nothing(build, ids):
    model, x = build(), ids(2, 17)
    padded = F.pad(x, (6, 0), value=3)
    documents = F.pad(torch.zeros_like(x), (6, 0), value=-1)
    torch.testing.assert_close(model(padded, documents)[:, 6:], model(x), atol=2e-5, rtol=0)


def test_packed_loss_is_the_mean_over_the_documents_own_targets(build, ids):
    model, x = build().train(), ids(1, sum(PACKED))
    loss = model.loss(x, packed_documents(PACKED))
    separate = [model.loss(document) for document in x.split(PACKED, dim=1)]
    for name, ahead in (("next_token", 1), ("mtp", 2)):
        counts = [max(n - ahead, 0) for n in PACKED]
        total = sum(n * getattr(s, name) for n, s in zip(counts, separate, strict=True))
        torch.testing.assert_close(getattr(loss, name), total / sum(counts), atol=1e-5, rtol=0)


def test_loss_is_cross_entropy_by_hand_and_counts_only_masked_targets(build, ids):
    model, x = build(), ids(2, 11)
    mask = torch.rand(2, 11) < 0.5
    logp = model(x).log_softmax(-1)
    nats = [-logp[b, t, x[b, t + 1]] for b in range(2) for t in range(10) if mask[b, t + 1]]
    loss = model.loss(x, loss_mask_BT=mask)
    torch.testing.assert_close(loss.next_token, torch.stack(nats).mean(), atol=1e-5, rtol=0)


def test_total_is_the_weighted_sum_and_padding_counts_nowhere(build, ids):
    model, x = build().train(), ids(2, 15)
    loss = model.loss(x, mtp_weight=0.3, balance_weight=0.2)
    total = loss.next_token + 0.3 * loss.mtp + 0.2 * loss.balance
    torch.testing.assert_close(loss.total, total)
    assert loss.mtp > 0 and loss.balance > 0
    assert loss.balance == model.eval().loss(x).balance  # evaluation measures the same objective
    model.train()
    load = model.expert_load().clone()
    padded = F.pad(x, (3, 2))
    documents = F.pad(torch.zeros_like(x), (3, 2), value=-1)
    again = model.loss(padded, documents, mtp_weight=0.3, balance_weight=0.2)
    for a, b in zip(loss, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert torch.equal(model.expert_load(), 2 * load)


def test_nothing_to_predict_is_a_zero_loss_not_nan(build):
    loss = build().loss(torch.tensor([[5]]))
    assert loss.next_token == 0 and loss.mtp == 0


def test_no_mtp_block_unless_asked(build, ids):
    model = build(num_nextn_predict_layers=0)
    assert not [name for name, _ in model.named_parameters() if name.startswith("mtp")]
    assert model.loss(ids(1, 8)).mtp == 0


def test_switches_remove_what_they_name(build, ids):
    x = ids(1, 16)
    assert not [n for n in build(use_qk_norm=False).state_dict() if "q_norm" in n or "k_norm" in n]
    for rope, count in (("sliding", 3), ("all", 4), ("none", 0)):
        model = build(rope_layers=rope)
        assert sum(layer.self_attn.use_rope for layer in model.model.layers) == count
        assert torch.isfinite(model(x)).all()


def test_every_parameter_gets_a_gradient_and_the_bias_none(build, ids):
    model = build().train()
    model.loss(ids(4, 32)).total.backward()
    silent = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert silent == []
    assert all(not layer.e_score_correction_bias.requires_grad for layer in model.moe_layers)


def test_correction_bias_stays_fp32_through_casts(build):
    model = build()
    before = [layer.e_score_correction_bias.clone() for layer in model.moe_layers]
    model.to(torch.bfloat16).double().half()
    for layer, bias in zip(model.moe_layers, before, strict=True):
        assert torch.equal(layer.e_score_correction_bias, bias)
        assert layer.e_score_correction_bias.dtype == torch.float32


def test_bf16_model_runs_and_is_near_fp32(build, ids):
    model, x = build(), ids(2, 16)
    exact = model(x)
    rounded = model.to(torch.bfloat16)(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_equal_seeds_give_equal_bits(ids, build):
    x = ids(4, 32)

    def gradients():
        torch.manual_seed(7)
        model = build().train()
        model.loss(x).total.backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize(
    ("input_ids", "documents", "message"),
    [
        (
            torch.zeros(1, 257, dtype=torch.int64),
            None,
            "257 tokens exceeds max_position_embeddings=256",
        ),
        (torch.tensor([[3, 61]]), None, "token id 61"),
        (torch.tensor([[3, -1]]), None, "token id -1"),
        (torch.zeros(1, 0, dtype=torch.int64), None, r"\[1, 0\]"),
        (torch.zeros(0, 3, dtype=torch.int64), None, r"\[0, 3\]"),
        (torch.zeros(4, dtype=torch.int64), None, r"\[4\]"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), r"\[1, 2\]"),
    ],
)
def test_bad_input_is_named(build, input_ids, documents, message):
    with pytest.raises(ValueError, match=message):
        build()(input_ids, documents)


def test_z_loss_is_in_the_total_and_not_in_its_parts(build, ids):
    model, x = build(), ids(2, 10)
    plain, with_z = model.loss(x), model.loss(x, z_loss=1e-2)
    for part in ("next_token", "mtp", "balance"):
        torch.testing.assert_close(getattr(with_z, part), getattr(plain, part))
    squares = model(x)[:, :-1].logsumexp(-1).square().mean()
    hidden = model.hidden_states(x)
    ahead = model.lm_head(model.mtp_hidden_states(x[:, 1:], hidden[:, :-1])[:, :-1])
    penalty = 1e-2 * (squares + 0.05 * ahead.logsumexp(-1).square().mean())
    torch.testing.assert_close(with_z.total, plain.total + penalty)
    assert with_z.total.item() > plain.total.item()
