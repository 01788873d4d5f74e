"""Configuration: frozen dataclasses for every stage, read from ``configs/<profile>.toml``.

A profile is a complete description of a run: every key of every section is written in its TOML
file, the same keys at every scale, so a reader sees all knobs in one place and a diff of two
profiles is the difference between two scales. Unknown, missing or mistyped keys are errors. This
module imports no torch.

The fields of :class:`ModelConfig` carry the names of the published ``config.json``
(``LGAI-EXAONE/K-EXAONE-236B-A23B``) and default to its values.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the remedy."""


@dataclass(frozen=True)
class ModelConfig:
    """The published architecture keys. Defaults are K-EXAONE-236B-A23B's values.

    Exception: ``num_nextn_predict_layers`` defaults to 0 (main model only); published: 1.
    The last two fields are switches for ablations; the defaults are the published behaviour.
    """

    vocab_size: int = 153_600
    hidden_size: int = 6144
    num_hidden_layers: int = 48
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 18_432  # dense FFN: the first layer and the MTP block
    moe_intermediate_size: int = 2048  # each routed expert and the shared one
    num_experts: int = 128
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    n_group: int = 1
    topk_group: int = 1
    sliding_window: int = 128  # keys seen by a window layer, the query's own included
    sliding_window_pattern: str = "LLLG"  # repeated over the depth; L = window, G = global
    layer_types: tuple[str, ...] = ()  # empty: derived from the pattern
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 262_144
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 53
    pad_token_id: int = 0
    num_nextn_predict_layers: int = 0
    use_qk_norm: bool = True
    rope_layers: str = "sliding"  # "sliding" (published), "all" or "none"

    def __post_init__(self):
        if not self.layer_types:
            pattern = self.sliding_window_pattern
            if not pattern or set(pattern) - set("LG"):
                raise ConfigError(f"sliding_window_pattern is {pattern!r}; use only L and G")
            names = {"L": "sliding_attention", "G": "full_attention"}
            types_ = tuple(names[pattern[i % len(pattern)]] for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", types_)
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types has {len(self.layer_types)} entries but num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        unknown = set(self.layer_types) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ConfigError(
                f"unknown layer type {sorted(unknown)[0]!r}; use 'sliding_attention' or "
                "'full_attention'"
            )
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: RoPE rotates halves")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"num_experts={self.num_experts}"
            )
        if self.scoring_func != "sigmoid":
            raise ConfigError(f"scoring_func={self.scoring_func!r}; only 'sigmoid' is published")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act={self.hidden_act!r}; only 'silu' (SwiGLU) is published")
        if not 1 <= self.topk_group <= self.n_group or self.num_experts % self.n_group:
            raise ConfigError(
                f"n_group={self.n_group}, topk_group={self.topk_group}: groups must divide "
                f"num_experts={self.num_experts} and topk_group must lie in 1..n_group"
            )
        in_reach = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > in_reach:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the number of experts "
                f"({in_reach}) in topk_group={self.topk_group} of n_group={self.n_group} groups"
            )
        if self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be at least 1")
        if self.num_nextn_predict_layers not in (0, 1):
            raise ConfigError(
                f"num_nextn_predict_layers={self.num_nextn_predict_layers}; the recipe has depth "
                "0 or 1"
            )
        if self.rope_layers not in ("sliding", "all", "none"):
            raise ConfigError(f"rope_layers={self.rope_layers!r}; use 'sliding', 'all' or 'none'")


@dataclass(frozen=True)
class RuntimeConfig:
    """How a profile runs. ``threads`` is fixed so that equal seeds give equal bits."""

    threads: int
    device: str  # "auto", "cpu" or "cuda"
    tensorboard: bool  # what is logged also goes to runs/<profile>/NN_name/tensorboard


@dataclass(frozen=True)
class DataConfig:
    """Which sources are read and how much of each category is kept."""

    sources: tuple[str, ...]  # names of cards in data_cards/
    steps: tuple[str, ...]  # cleaning steps in order: names of kexa.data.cleaning.STEPS
    evaluation: tuple[str, ...]  # cards of evaluation sets whose items the text must not repeat
    bytes_per_category: int  # UTF-8 bytes kept per category (en, ko, es, de, ja, vi, code, stem)
    heldout_share: float  # share of documents held out, near-duplicates together


@dataclass(frozen=True)
class TokenizerConfig:
    """The two-stage SuperBPE tokenizer and the baseline it is measured against."""

    vocab_size: int
    baseline_ratio: float  # reported: 100K of 150K
    kept_share: float  # reported: 0.70 of the baseline's vocabulary is kept
    superword_share: float  # reported: 0.20 of the vocabulary
    superword_split: dict[str, float]  # reported: en 2, ko 3, multilingual 1
    max_superword_words: int  # chosen: 4


@dataclass(frozen=True)
class ComparisonConfig:
    """What tokenizers are compared by beside bytes per token, and with which public ones."""

    public: tuple[str, ...]  # cards of tokenizers that packages ship
    seeds: int  # models per tokenizer
    steps: int
    batch_size: int  # rows per step
    row_bytes: int  # UTF-8 bytes of a training row on average, and of a held-out passage at most
    heldout_bytes: int  # per category, whole documents
    learning_rate: float
    warmup_share: float
    decay_share: float
    weight_decay: float
    balance_weight: float
    balance_step: float  # per optimizer step
    model: ModelConfig  # the tokenizer gives its vocabulary


@dataclass(frozen=True)
class PretrainConfig:
    """Three-stage pretraining with Muon, WSD and FP8."""

    sequence_length: int
    batch_size: int  # sequences per optimizer step
    stage_steps: dict[str, int]  # foundation, domain, reasoning
    mixtures: dict[str, dict[str, float]]  # per stage: weight of each category or group
    language_temperature: float  # how "multilingual" is shared out: 1 by size, larger more evenly
    synthetic_documents: dict[str, int]  # how many documents of each synthetic kind are made
    learning_rate: float  # reported: peak 3e-4
    warmup_share: float
    decay_share: float
    weight_decay: float
    accumulate: int  # micro-batches per optimizer step
    mtp_weight: float  # reported: 0.05
    balance_weight: float  # reported: 1e-4
    balance_step: float  # reported: 1e-4 per optimizer step
    z_loss: float  # not reported; 0 is off
    numerics: str  # "fp8", "fp8-rowwise", "fp8-tensorwise", "bf16" or "fp32"
    reference: str  # numerics of a second run from the same seed to compare with; "" for none
    processes: int  # of this machine, over which notebook 04 spreads the run; on GPUs one each
    recompute: bool  # layers run again in the backward pass instead of keeping activations
    offload_optimizer: bool  # its states wait in host memory; for GPUs, changes no bit of training
    checkpoint_every: int  # optimizer steps
    metrics_every: int  # optimizer steps between measurements that cost time; 0 is never
    validation_rows: int  # held-out sequences per category
    probes: dict[str, int]  # questions of each kind of kexa.data.choices asked after each stage

    def __post_init__(self):
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ConfigError(
                f"pretrain.accumulate={self.accumulate} must divide "
                f"pretrain.batch_size={self.batch_size}"
            )
        if len(self.stage_steps) < 2 or min(self.stage_steps.values()) < 1:
            raise ConfigError(
                f"pretrain.stage_steps={self.stage_steps}: two stages or more, of a step or more"
            )


RIVALS = ("gzip", "xz", "xz after its own text", "n-gram")  # of :mod:`kexa.eval.baselines`


@dataclass(frozen=True)
class BaselinesConfig:
    """What the pretrained model is compared with on held-out text."""

    order: int  # tokens of the longest n-gram
    train_bytes: int  # UTF-8 bytes per category that a baseline reads, in whole documents
    heldout_bytes: int  # UTF-8 bytes per category that all are compared on, in whole documents
    beaten: tuple[str, ...]  # those of RIVALS that the model must beat in every category

    def __post_init__(self):
        for key in ("order", "train_bytes", "heldout_bytes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"baselines.{key}={getattr(self, key)} must be 1 or more")
        for name in self.beaten:
            if name not in RIVALS:
                raise ConfigError(f"baselines.beaten names {name!r}; use {', '.join(RIVALS)}")


@dataclass(frozen=True)
class ArchitectureConfig:
    """The short run that shows expert load with and without balancing."""

    steps: int
    batch_size: int
    sequence_length: int
    bytes_per_category: int  # UTF-8 bytes of the training text that are read
    learning_rate: float
    weight_decay: float
    balance_weight: float  # reported: 1e-4
    balance_step: float  # reported: 1e-4 per optimizer step
    model: dict[str, int]  # keys of [model] that differ here


@dataclass(frozen=True)
class MTPConfig:
    """Training with the MTP block and drafting with it; batches and rates are those of pretrain."""

    steps: int
    prompts: int  # held-out documents per category that are continued
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class AblationConfig:
    """Paired short runs, one change at a time; schedule and loss weights are those of pretrain."""

    seeds: int  # runs per variant
    steps: int
    batch_size: int
    sequence_length: int
    validation_rows: int  # held-out sequences per category
    learning_rate: float
    numerics: str  # "fp8", "fp8-rowwise", "fp8-tensorwise", "bf16" or "fp32"
    model: dict[str, int]  # keys of [model] that differ here: ablations run on a smaller model


@dataclass(frozen=True)
class ExtensionStage:
    """One stage of context extension."""

    sequence_length: int
    rows: dict[str, int]  # sequences per optimizer step: rehearsal, reasoning, long
    needles: int  # most facts in one retrieval document
    steps: int  # optimizer steps per round
    rounds: int  # at most; the gate ends them
    learning_rate: float  # the peak of every round
    weight_decay: float


@dataclass(frozen=True)
class ExtensionConfig:
    """Context extension in stages, gated by needles in a haystack."""

    stages: dict[str, ExtensionStage]  # in this order
    haystack: str  # category whose text surrounds the facts, in training and in probes
    shortest: int  # tokens of the shortest retrieval document; a power of two times it fills a row
    digits: int  # of a value
    warmup_share: float  # of a round
    decay_share: float
    mtp_weight: float
    balance_weight: float
    balance_step: float
    numerics: str  # "fp8", "fp8-rowwise", "fp8-tensorwise", "bf16" or "fp32"
    checkpoint_every: int  # optimizer steps
    probe_lengths: tuple[int, ...]  # tokens of prompt and answer together
    probe_depths: tuple[float, ...]  # 0 is the beginning, 1 the end
    probe_trials: int  # tasks in each cell of depths x lengths
    probe_distractors: int  # other facts in the harder probe, which the gate does not use
    threshold: float  # the gate: least accuracy at every length up to the stage's
    short_rise: float  # largest relative rise of the short-context loss
    position_rows: int  # held-out long documents whose loss by position is measured


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: what it is made of and how long it lasts."""

    examples: dict[str, int]  # conversations drawn per task family (math, instruction)
    dialogue_source: str  # the data card of human small talk
    dialogues: int  # conversations of it, at most what the source holds
    max_terms: int  # size of the sums, in training and in every later stage: numbers in one
    max_number: int  # and the largest of them
    reasoning_ratio: float  # reported: 1.5 reasoning tokens to 1 non-reasoning (EXAONE 4.0)
    sequence_length: int
    batch_size: int  # sequences per optimizer step
    steps: int
    learning_rate: float
    warmup_share: float
    decay_share: float
    weight_decay: float
    mtp_weight: float
    max_new_tokens: int  # when answers are sampled to be checked
    heldout_prompts: int  # per task family, for accuracy before and after


@dataclass(frozen=True)
class RLConfig:
    """AGAPO. None of these values is published."""

    iterations: int  # rollout batches
    prompts: int  # B: prompts per rollout batch, half of each task family
    group_size: int  # G: responses per prompt
    groups_per_pass: int  # groups in one forward pass; bounds memory, not the gradient
    updates: int  # optimizer steps per rollout batch: all but the first are off-policy
    epsilon: float  # upper truncation of importance ratios
    temperature: float
    max_new_tokens: int
    learning_rate: float
    weight_decay: float
    heldout_prompts: int  # per task family
    heldout_samples: int  # responses per held-out prompt, before and after


@dataclass(frozen=True)
class PreferenceConfig:
    """GROUPER. None of these values is published (SimPER: learning rate 3e-7 to 1e-6, 1 epoch)."""

    prompts: int  # offline groups: half of them chat, half chat with a constraint
    group_size: int  # G: responses per prompt
    rule_weight: float  # share of the rule's verdict where a prompt has one
    judge: str  # "rules", or the base URL of an OpenAI-compatible server
    judge_model: str  # that server's name of the model; empty with "rules"
    temperature: float
    max_new_tokens: int
    batch_prompts: int  # groups per optimizer step
    epochs: int
    learning_rate: float
    weight_decay: float
    heldout_prompts: int
    heldout_samples: int  # responses per held-out prompt, before and after


@dataclass(frozen=True)
class EvaluationConfig:
    """How many items of each benchmark are used, and how long a reply may be."""

    choices: int  # items per multiple-choice benchmark
    problems: int  # items per benchmark whose answer is written
    programs: int  # HumanEval problems
    max_new_tokens: int  # per written answer
    program_tokens: int  # per HumanEval completion
    program_seconds: int  # CPU time of a program
    needles: int  # needle tasks, at evenly spread depths
    needle_tokens: int  # length of their text
    parse_floor: float  # least share of readable replies for a score to count


@dataclass(frozen=True)
class SafetyConfig:
    """Who judges the responses to the safety set, and a short fine-tuning that moves them."""

    judge: str  # "rules", or the base URL of an OpenAI-compatible server
    judge_model: str  # the model asked there
    max_new_tokens: int
    dialogues: int  # safety dialogues to learn from, half of them harmless
    sequence_length: int
    batch_size: int  # sequences per optimizer step
    steps: int
    learning_rate: float
    warmup_share: float
    decay_share: float
    weight_decay: float
    mtp_weight: float


@dataclass(frozen=True)
class AgentsConfig:
    """The tool environment, the demonstrations to learn from, and the search agent."""

    candidates: int  # tasks drawn before the filter
    tasks: int  # of those that pass it, how many are run
    max_steps: int  # replies in one episode
    max_new_tokens: int  # per reply
    context: int  # tokens that a conversation and its next reply may take
    demonstrations: int  # candidates whose oracle episodes the model is trained on
    steps: int  # optimizer steps on them
    batch_size: int
    sequence_length: int
    learning_rate: float
    weight_decay: float
    mtp_weight: float
    questions: int  # asked of the search agent
    towns: int  # pages that the answer to one question needs
    search_steps: int
    compress_every: int  # reported: 50 of up to 500 steps
    memory_tokens: int  # what the agent with a short memory sees of its conversation


@dataclass(frozen=True)
class Config:
    """One profile. ``model.vocab_size`` always equals ``tokenizer.vocab_size``."""

    profile: str
    runtime: RuntimeConfig
    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    comparison: ComparisonConfig
    architecture: ArchitectureConfig
    pretrain: PretrainConfig
    baselines: BaselinesConfig
    mtp: MTPConfig
    extension: ExtensionConfig
    sft: SFTConfig
    rl: RLConfig
    preference: PreferenceConfig
    evaluation: EvaluationConfig
    safety: SafetyConfig
    agents: AgentsConfig
    ablation: AblationConfig


def load(profile: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read ``configs/<profile>.toml`` (or the TOML file at a path) and apply dotted overrides.

    Example: ``load("smoke", {"tokenizer.vocab_size": 4000})``.

    Raises:
        ConfigError: unknown profile, section or key; missing key; value of the wrong type.
    """
    path = Path(profile)
    if path.suffix != ".toml":
        path = ROOT / "configs" / f"{profile}.toml"
    if not path.is_file():
        profiles = {p.stem for p in (ROOT / "configs").glob("*.toml")} - {"studies"}
        known = ", ".join(sorted(profiles))
        raise ConfigError(f"no profile {str(profile)!r}: use {known} or the path of a .toml file")
    tree = read_toml(path)
    for dotted, value in (overrides or {}).items():
        _override(tree, dotted, value)
    tree["profile"] = path.stem
    vocab_size = tree.get("tokenizer", {}).get("vocab_size")
    if isinstance(tree.get("model"), dict) and type(vocab_size) is int:
        given = tree["model"].setdefault("vocab_size", vocab_size)
        if given != vocab_size:
            raise ConfigError(
                f"model.vocab_size={given} but tokenizer.vocab_size={vocab_size}; "
                "set tokenizer.vocab_size only"
            )
    return build(Config, tree, "")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested dicts.

    Raises:
        ConfigError: it is not valid TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}") from error


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested dicts and lists, ready for JSON."""
    return dataclasses.asdict(config)


def _override(tree: dict, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node = tree
    for i, name in enumerate(parents):
        if not isinstance(node.get(name), dict):
            section = ".".join(parents[: i + 1])
            raise ConfigError(f"override {dotted!r}: no section {section!r}" + _hint(name, node))
        node = node[name]
    node[leaf] = value


def build(cls: type, tree: Mapping[str, Any], where: str) -> Any:
    """A dataclass from nested dicts, strictly. ``where`` is the dotted path that errors name.

    Raises:
        ConfigError: unknown key; missing key; value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise ConfigError(f"unknown config key {_join(where, key)!r}" + _hint(key, hints))
    values = {}
    for f in fields(cls):
        if f.name in tree:
            values[f.name] = _convert(hints[f.name], tree[f.name], _join(where, f.name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing config key {_join(where, f.name)!r}")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section, got {value!r}")
        return build(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}")
        return {k: _convert(args[1], v, _join(where, k)) for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
