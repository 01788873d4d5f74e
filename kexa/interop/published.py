"""The published checkpoint's names: keys of ``config.json`` and names of tensors.

Our names are the published ones but for two differences. Experts are stacked per layer here and
single tensors there:

    mlp.experts.gate_up_proj[e, :F]     mlp.experts.<e>.gate_proj.weight
    mlp.experts.gate_up_proj[e, F:]     mlp.experts.<e>.up_proj.weight
    mlp.experts.down_proj[e]            mlp.experts.<e>.down_proj.weight

and ``config.json`` spells a few things twice (``layer_types`` and ``sliding_windows``;
``first_k_dense_replace`` and ``mlp_layer_types``). Older revisions are read too: ``is_moe_layer``
or ``first_last_k_dense_replace`` for the dense layers, ``rope_theta`` at top level,
``sliding_window_pattern`` as a number, ``torch_dtype``.

Legend: E experts, F inner size of an expert, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from kexa.config import ModelConfig

# Ablation switches have no published key: written only where they leave the published behaviour.
SWITCHES = ("use_qk_norm", "rope_layers")
# Keys without which the shapes are unknown; every other key has the published value when absent.
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "sliding_window",
)


def published_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under its published names; expert tensors become views of the stacks."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stack, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, (gate_FD, up_FD) in enumerate(expert.chunk(2) for expert in tensor):
                tensors[f"{stack}.{e}.gate_proj.weight"] = gate_FD
                tensors[f"{stack}.{e}.up_proj.weight"] = up_FD
        elif kind == "down_proj":
            tensors |= {f"{stack}.{e}.down_proj.weight": expert for e, expert in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors


def to_published(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of ``config.json`` for weights of ``dtype``, such as ``"bfloat16"``."""
    written: dict[str, Any] = {
        "architectures": ["ExaoneMoeForCausalLM"],
        "model_type": "exaone_moe",
        "dtype": dtype,
    }
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "rope_theta":
            written["rope_parameters"] = {"rope_theta": value, "rope_type": "default"}
        elif f.name not in SWITCHES or value != f.default:
            written[f.name] = list(value) if isinstance(value, tuple) else value
    sparse = [i >= config.first_k_dense_replace for i in range(config.num_hidden_layers)]
    window = config.sliding_window
    written |= {
        "is_moe_layer": sparse,
        "mlp_layer_types": ["sparse" if s else "dense" for s in sparse],
        "sliding_windows": [window if t == "sliding_attention" else 0 for t in config.layer_types],
        "mtp_layer_types": ["full_attention"] * config.num_nextn_predict_layers,
        "mtp_sliding_windows": [0] * config.num_nextn_predict_layers,
        "attention_dropout": 0.0,
        "use_cache": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return written


def from_published(written: Mapping[str, Any]) -> ModelConfig:
    """The :class:`ModelConfig` that a published ``config.json`` describes.

    Raises:
        ValueError: another model type, a missing key, or a feature the recipe does not have.
    """
    if written.get("model_type") != "exaone_moe":
        raise ValueError(
            f"config.json has model_type={written.get('model_type')!r}; expected 'exaone_moe'"
        )
    missing = [key for key in REQUIRED if key not in written]
    if missing:
        raise ValueError(f"config.json lacks {missing[0]!r}")
    if written.get("attention_dropout"):
        raise ValueError(
            f"attention_dropout={written['attention_dropout']}: the recipe has no dropout"
        )
    known = {f.name for f in fields(ModelConfig)}
    values = {key: value for key, value in written.items() if key in known and value is not None}
    values.setdefault("head_dim", written["hidden_size"] // written["num_attention_heads"])
    values["first_k_dense_replace"] = _dense_layers(written)
    values["rope_theta"] = _rope_theta(written)
    values["layer_types"] = tuple(values.get("layer_types", ()))
    pattern = values.get("sliding_window_pattern")
    if isinstance(pattern, int):  # every n-th layer is global
        values["sliding_window_pattern"] = "L" * (pattern - 1) + "G" if pattern else "G"
    return ModelConfig(**values)


def _dense_layers(written: Mapping[str, Any]) -> int:
    """How many first layers are dense, by whichever of the four spellings is there."""
    kinds = written.get("mlp_layer_types")
    sparse = [k == "sparse" for k in kinds] if kinds else written.get("is_moe_layer")
    if not sparse:
        older = written.get("first_last_k_dense_replace", ModelConfig.first_k_dense_replace)
        return written.get("first_k_dense_replace", older)
    dense = sparse.index(True) if True in sparse else len(sparse)
    if not all(sparse[dense:]) or len(sparse) != written["num_hidden_layers"]:
        raise ValueError(
            f"mlp_layer_types={kinds or sparse}: expected one entry per layer, the dense ones first"
        )
    return dense


def _rope_theta(written: Mapping[str, Any]) -> float:
    rope = written.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default" or written.get("rope_scaling"):
        raise ValueError(
            f"rope scaling {written.get('rope_scaling') or kind!r}: the recipe never scales RoPE"
        )
    return float(rope.get("rope_theta", written.get("rope_theta", ModelConfig.rope_theta)))
