"""The published layout: names, shapes, shards, and every way a checkpoint can be broken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kexa.interop import from_published, load_hf, published_tensors, save_hf, to_published
from kexa.model import KexaForCausalLM, ModelConfig

TINY = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    intermediate_size=20,
    moe_intermediate_size=8,
    num_experts=3,
    num_experts_per_tok=2,
    sliding_window=4,
    sliding_window_pattern="LLG",
    max_position_embeddings=64,
    num_nextn_predict_layers=1,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = KexaForCausalLM(TINY)
    for layer in model.moe_layers:
        layer.e_score_correction_bias.normal_()
    return model.eval()


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def rewrite(path, change):
    """Apply ``change`` to the tensors of an unsharded checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_names_and_shapes_are_the_published_ones(model, tmp_path):
    save_hf(model, tmp_path)
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}
    attention = {"q_proj": [24, 16], "k_proj": [12, 16], "v_proj": [12, 16], "o_proj": [16, 24]}
    attention |= {"q_norm": [6], "k_norm": [6]}

    def mlp(inner):
        return {"gate_proj": [inner, 16], "up_proj": [inner, 16], "down_proj": [16, inner]}

    expected = {
        "model.embed_tokens.weight": [31, 16],
        "lm_head.weight": [31, 16],
        "model.norm.weight": [16],
    }
    for prefix in ("model.layers.0.", "model.layers.1.", "model.layers.2.", "mtp.layers.0."):
        expected |= {f"{prefix}{n}_layernorm.weight": [16] for n in ("input", "post_attention")}
        expected |= {f"{prefix}self_attn.{n}.weight": s for n, s in attention.items()}
    for prefix in ("model.layers.0.", "mtp.layers.0."):
        expected |= {f"{prefix}mlp.{n}.weight": s for n, s in mlp(20).items()}
    for layer in ("model.layers.1.mlp.", "model.layers.2.mlp."):
        expected |= {f"{layer}gate.weight": [3, 16], f"{layer}e_score_correction_bias": [3]}
        for owner in ("shared_experts", "experts.0", "experts.1", "experts.2"):
            expected |= {f"{layer}{owner}.{n}.weight": s for n, s in mlp(8).items()}
    expected |= {"mtp.fc.weight": [16, 32]}
    expected |= {
        f"mtp.{n}.weight": [16] for n in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    assert shapes == expected


def test_published_model_has_the_published_number_of_tensors():
    with torch.device("meta"):
        model = KexaForCausalLM(ModelConfig(num_nextn_predict_layers=1))
    assert len(published_tensors(model.state_dict())) == 18_688


@pytest.mark.parametrize("shard", [5_000_000_000, 4_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_is_byte_equal(model, tmp_path, shard, dtype):
    save_hf(model.to(dtype), tmp_path / "a", max_shard_bytes=shard)
    loaded = load_hf(tmp_path / "a")
    for (name, a), (other, b) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    save_hf(loaded, tmp_path / "b", max_shard_bytes=shard)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (len(contents(tmp_path / "a")) > 3) == (shard == 4_000)


def test_loaded_model_trains(model, tmp_path):
    save_hf(model, tmp_path)
    loaded = load_hf(tmp_path).train()
    loaded.loss(torch.randint(0, 31, (2, 8))).total.backward()
    loaded.update_balance_bias()
    assert all(p.grad is not None for p in loaded.parameters())


def test_dtype_casts_all_but_the_bias(model, tmp_path):
    save_hf(model, tmp_path)
    loaded = load_hf(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for ours, theirs in zip(model.moe_layers, loaded.moe_layers, strict=True):
        assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)


def test_resharding_removes_stale_files(model, tmp_path):
    save_hf(model, tmp_path, max_shard_bytes=4_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    save_hf(model, tmp_path)
    assert [f.name for f in tmp_path.glob("model*")] == ["model.safetensors"]
    save_hf(model, tmp_path, max_shard_bytes=4_000)
    assert not (tmp_path / "model.safetensors").exists()


def test_every_shard_keeps_to_the_limit_and_the_index_is_right(model, tmp_path):
    save_hf(model, tmp_path, max_shard_bytes=4_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = 0
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= 4_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total


def test_tied_head_is_stored_once(tmp_path):
    config = ModelConfig(**{**TINY.__dict__, "tie_word_embeddings": True})
    model = KexaForCausalLM(config)
    save_hf(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_hf(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_bias_is_read_under_its_name_in_transformers(model, tmp_path):
    save_hf(model, tmp_path)

    def rename(tensors):
        for name in [n for n in tensors if n.endswith("correction_bias")]:
            tensors[name.replace("mlp.e_", "mlp.gate.e_")] = tensors.pop(name)

    rewrite(tmp_path, rename)
    bias = model.moe_layers[1].e_score_correction_bias
    assert torch.equal(load_hf(tmp_path).moe_layers[1].e_score_correction_bias, bias)


def test_missing_unexpected_and_misshapen_tensors_are_named(model, tmp_path):
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    for change, message in (
        (lambda t: t.pop(name), rf"lacks tensor '{name}'"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
        (lambda t: t.update({name: torch.zeros(8, 15)}), rf"{name}.*\[8, 15\].*\[8, 16\]"),
        (lambda t: [t.pop(n) for n in list(t) if "mtp" in n], "num_nextn_predict_layers to 0"),
    ):
        save_hf(model, tmp_path)
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=message):
            load_hf(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_is_named(model, tmp_path, keep):
    save_hf(model, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        load_hf(tmp_path)


def test_missing_files_are_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"no config.json"):
        load_hf(tmp_path)
    save_hf(model, tmp_path, max_shard_bytes=4_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"names model-00002"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load_hf(tmp_path)


def test_config_of_the_published_model():
    """The keys that other engines read, with the published values."""
    written = to_published(ModelConfig(num_nextn_predict_layers=1), "bfloat16")
    expected = {
        "architectures": ["ExaoneMoeForCausalLM"],
        "model_type": "exaone_moe",
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"},
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 12,
        "sliding_windows": [128, 128, 128, 0] * 12,
        "sliding_window_pattern": "LLLG",
        "mlp_layer_types": ["dense"] + ["sparse"] * 47,
        "is_moe_layer": [False] + [True] * 47,
        "mtp_layer_types": ["full_attention"],
        "mtp_sliding_windows": [0],
        "num_experts": 128,
        "hidden_size": 6144,
        "eos_token_id": 53,
    }
    assert {key: written[key] for key in expected} == expected
    assert "use_qk_norm" not in written and "rope_theta" not in written


def test_config_round_trip_keeps_every_field():
    for config in (
        TINY,
        ModelConfig(**{**TINY.__dict__, "use_qk_norm": False, "rope_layers": "all"}),
    ):
        assert from_published(json.loads(json.dumps(to_published(config, "float32")))) == config


def test_older_revisions_of_the_config_are_read():
    written = to_published(TINY, "float32")
    for key in (
        "mlp_layer_types",
        "layer_types",
        "rope_parameters",
        "first_k_dense_replace",
        "dtype",
    ):
        del written[key]
    written |= {
        "rope_theta": 5e5,
        "rope_scaling": None,
        "sliding_window_pattern": 3,
        "torch_dtype": "float32",
    }
    config = from_published(written)
    assert config.layer_types == TINY.layer_types
    assert (config.rope_theta, config.first_k_dense_replace) == (5e5, 1)
    del written["is_moe_layer"]
    written["first_last_k_dense_replace"] = 2
    assert from_published(written).first_k_dense_replace == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "llama3"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "dense ones first"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ],
)
def test_what_the_recipe_does_not_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_published(to_published(TINY, "float32") | change)
    lacking = to_published(TINY, "float32")
    del lacking["num_experts"]
    with pytest.raises(ValueError, match="lacks 'num_experts'"):
        from_published(lacking)


def test_bad_targets_are_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_hf(model, tmp_path / "file")
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_hf(model, tmp_path, max_shard_bytes=0)


def test_a_tensor_of_another_dtype_is_named(model, tmp_path):
    save_hf(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model.norm.weight' has dtype I64"):
        load_hf(tmp_path)
