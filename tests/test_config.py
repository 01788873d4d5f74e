"""Configs are strict: every profile loads, and every mistake is named."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest

from kexa.config import ROOT, ConfigError, ModelConfig, as_dict, load

PROFILES = ("smoke", "laptop", "h100", "full")


def tree(profile: str) -> dict:
    return tomllib.loads((ROOT / "configs" / f"{profile}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_load(profile):
    config = load(profile)
    assert config.profile == profile
    assert config.model.vocab_size == config.tokenizer.vocab_size
    assert isinstance(as_dict(config)["model"]["layer_types"], list | tuple)


@pytest.mark.parametrize("profile", PROFILES[1:])
def test_all_scales_have_the_same_keys(profile):
    """A diff of two profiles is the difference between two scales, never a missing knob."""
    for section, values in tree("smoke").items():
        assert values.keys() == tree(profile)[section].keys(), f"[{section}] in {profile}.toml"
    assert tree(profile).keys() == tree("smoke").keys()


def test_overrides_are_dotted_and_typed():
    config = load("smoke", {"tokenizer.vocab_size": 5000, "model.rope_theta": 10})
    assert config.tokenizer.vocab_size == config.model.vocab_size == 5000
    assert config.model.rope_theta == 10.0
    assert type(config.model.rope_theta) is float


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"tokenizer.vocab_sizes": 1},
            "unknown config key 'tokenizer.vocab_sizes'; did you mean 'vocab_size'",
        ),
        ({"tokeniser.vocab_size": 1}, "no section 'tokeniser'; did you mean 'tokenizer'"),
        ({"tokenizer.vocab_size": "big"}, "tokenizer.vocab_size must be int, got 'big'"),
        ({"tokenizer.vocab_size": True}, "tokenizer.vocab_size must be int, got True"),
        ({"data.sources": "wheel"}, "data.sources must be a list, got 'wheel'"),
        ({"data.sources": [1]}, "data.sources[0] must be str, got 1"),
        ({"model": 3}, "model must be a section, got 3"),
        ({"model.vocab_size": 7}, "model.vocab_size=7 but tokenizer.vocab_size="),
        ({"pretrain.accumulate": 3}, "accumulate=3 must divide pretrain.batch_size=16"),
        ({"pretrain.stage_steps": {"foundation": 9}}, "two stages or more"),
        ({"baselines.order": 0}, "baselines.order=0 must be 1 or more"),
        ({"baselines.beaten": ["xz", "zip"]}, "beaten names 'zip'; use gzip, xz"),
        ({"model.sliding_window_pattern": "LLX"}, "sliding_window_pattern is 'LLX'"),
        ({"model.num_attention_heads": 5}, "num_attention_heads=5 is not a multiple"),
        ({"model.num_key_value_heads": 0}, "not a multiple of num_key_value_heads=0"),
        ({"model.layer_types": ["sparse_attention"] * 4}, "unknown layer type 'sparse_attention'"),
        ({"model.n_group": 3}, "n_group=3, topk_group=1: groups must divide"),
        ({"model.n_group": 0}, "n_group=0, topk_group=1"),
        ({"model.n_group": 8}, "(1) in topk_group=1 of n_group=8 groups"),
        ({"model.num_experts_per_tok": 999}, "num_experts_per_tok=999 exceeds"),
        ({"model.sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"model.head_dim": 31}, "head_dim=31 must be even"),
        ({"model.rope_layers": "some"}, "rope_layers='some'"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ConfigError) as error:
        load("smoke", overrides)
    assert message in str(error.value)


def test_a_missing_key_and_a_bad_file_are_named(tmp_path):
    text = (ROOT / "configs" / "smoke.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("vocab_size", "# vocab_size", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match="missing config key 'tokenizer.vocab_size'"):
        load(path)
    path.write_text("[model", encoding="utf-8")
    with pytest.raises(ConfigError, match="mine.toml is not valid TOML"):
        load(path)
    with pytest.raises(ConfigError, match="no profile 'nope': use full, h100, laptop, smoke"):
        load("nope")


def test_a_path_is_a_profile(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes((ROOT / "configs" / "smoke.toml").read_bytes())
    assert load(str(path)).profile == "mine"
    assert dataclasses.replace(load(path), profile="smoke") == load("smoke")


def test_full_is_the_published_model():
    assert load("full").model == ModelConfig(num_nextn_predict_layers=1)


def test_the_defaults_are_the_published_model():
    model = ModelConfig()
    assert model.layer_types.count("sliding_attention") == 36
    assert model.layer_types.count("full_attention") == 12
    assert model.layer_types[:4] == ("sliding_attention",) * 3 + ("full_attention",)
    with pytest.raises(ConfigError, match="layer_types has 2 entries but num_hidden_layers is 48"):
        ModelConfig(layer_types=("full_attention", "full_attention"))
