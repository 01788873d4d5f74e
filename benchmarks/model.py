"""The whole model against ``transformers``' ExaoneMoe on a CPU: equal weights, equal results, time.

python -m benchmarks.model train      forward and backward of the loss
python -m benchmarks.model experts    a sparse layer against one dense product of equal FLOPs
python -m benchmarks.model decode     greedy tokens, prefill, steps at long context, cache bytes
python -m benchmarks.model load       peak memory of reading a checkpoint

Minutes each; ``--quick``: small shapes and no file, seconds, to see that it works.

Both sides read one checkpoint. Each of their expert implementations, and each of their attention
implementations, runs once in fp32 and bf16 unless it would not fit in memory, and so does our
model. Losses, tokens or logits are compared with ours in fp32 (those in bf16: losses, loosely), and
the fastest of each side meet in interleaved rounds. Reported are the median and the middle 80% of
the rounds' ratios. A row whose results disagree gets no ratio.

chosen: of the longest training shape only the variants that won the shape before run, as one step
there takes minutes; a long prompt is read with grouped products only. ``target`` is what the
project asks of a row; a row below it is not an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.__main__ import device_name, results_of, spread
from kexa.interop import load_hf, save_hf
from kexa.model import Cache, KexaForCausalLM, ModelConfig, generate
from kexa.model.moe import SparseMoE
from kexa.record import commit, write_atomic

THREADS = 2
SAME_LOSS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # nats, from ours in fp32
SAME_GRADIENT = 1e-3  # of the norm of all gradients, fp32
SAME_LOGITS = 1e-3  # at unit scale, fp32
ROOM = 6 * 2**30  # bytes that a variant may keep for its backward pass

CONFIG = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=1024,
    moe_intermediate_size=128,
    num_experts=16,
    num_experts_per_tok=4,
    sliding_window=128,
    initializer_range=0.06,  # logits and router scores at unit scale: agreement says something
)
MANY_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8}
# About 0.9e9 weights with the layer pattern of the published model: 2 GB in bf16.
LOADED = replace(
    CONFIG,
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=4096,
    num_experts=40,
    moe_intermediate_size=1024,
    num_nextn_predict_layers=1,
)


@dataclass(frozen=True)
class Shape:
    """A row of the tables: ``rows`` of ``tokens``; ``target`` is the ratio asked for."""

    rows: int
    tokens: int
    target: float
    rounds: int = 9
    changes: tuple[tuple[str, int], ...] = ()  # of CONFIG
    only_winners: bool = False  # only the variants that won the shape before

    @property
    def config(self) -> ModelConfig:
        return replace(CONFIG, layer_types=(), **dict(self.changes))

    def __str__(self) -> str:
        c = self.config
        return f"{self.rows}x{self.tokens}, {c.num_experts} experts top-{c.num_experts_per_tok}"


TRAINING = (
    Shape(4, 512, 1.6),
    Shape(4, 512, 3.0, changes=tuple(MANY_EXPERTS.items())),
    Shape(1, 4096, 3.0, rounds=5),
    Shape(1, 16_384, 8.0, rounds=1, only_winners=True),
)
GENERATION = (Shape(1, 64, 3.0), Shape(16, 64, 3.0))
NEW_TOKENS = 128
PREFILL = Shape(1, 16_384, 4.0, rounds=3)
EXPERTS = ((torch.float32, 0.6), (torch.bfloat16, 0.5))
LAYERS = (
    (CONFIG, 2048),
    (replace(CONFIG, **MANY_EXPERTS), 2048),
    (replace(CONFIG, hidden_size=1024, moe_intermediate_size=512), 2048),
)
QUICK_TRAINING, QUICK_GENERATION = (Shape(1, 40, 1.6, rounds=3),), (Shape(2, 16, 3.0, rounds=3),)


@dataclass(frozen=True)
class Variant:
    """One way to run the model; ``attention`` is empty for ours."""

    dtype: torch.dtype
    attention: str = ""
    experts: str = ""

    def __str__(self) -> str:
        kind = f"transformers {self.attention}, {self.experts}" if self.attention else "kexa"
        return f"{kind}, {str(self.dtype).removeprefix('torch.')}"

    def load(self, folder: Path) -> nn.Module:
        if not self.attention:
            return load_hf(folder, self.dtype)
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=self.dtype,
            attn_implementation=self.attention,
            experts_implementation=self.experts,
        )

    def kept(self, config: ModelConfig, rows: int, tokens: int) -> float:
        """Bytes of scores and of copied expert weights that a backward pass would need."""
        item, sparse = self.dtype.itemsize, config.num_hidden_layers - config.first_k_dense_replace
        scores = 3 * config.num_hidden_layers * rows * config.num_attention_heads * tokens**2
        pairs = rows * tokens * config.num_experts_per_tok
        copies = sparse * pairs * 3 * config.moe_intermediate_size * config.hidden_size
        return item * (
            scores * (self.attention == "eager") + copies * (self.experts == "batched_mm")
        )


OURS = tuple(Variant(dtype) for dtype in SAME_LOSS)
WAYS = (("sdpa", "grouped_mm"), ("sdpa", "batched_mm"), ("sdpa", "eager"), ("eager", "grouped_mm"))
THEIRS = tuple(Variant(dtype, *way) for dtype, way in itertools.product(SAME_LOSS, WAYS))


def training(shape: Shape, variants: Collection[Variant]) -> tuple[dict, list[Variant]]:
    """A training step, ours and the best of ``transformers``; also the two variants that met."""
    models, ids = loaded(shape.config, variants), token_ids(shape)
    steps = {v: partial(_train_step, model.train(), ids) for v, model in models.items()}
    loss, gradient = steps[OURS[0]]().item(), _gradient(models[OURS[0]])
    trial = {}
    for variant, step in steps.items():
        trial[variant], found = timed(step)
        off = {"loss": abs(found.item() - loss)}
        allowed = {"loss": SAME_LOSS[variant.dtype], "gradients": SAME_GRADIENT}
        if variant.dtype == torch.float32:
            difference = _gradient(models[variant]) - gradient
            off["gradients"] = float(difference.norm() / gradient.norm())
        models[variant].zero_grad()
        for name, error in off.items():
            if error > allowed[name]:
                return red(shape, f"{variant}: {name} off by {error:.1e}"), []
    row, winners = race(steps, shape, trial)
    return {"shape": str(shape), "loss": round(loss, 6), **row}, winners


def generation(shape: Shape, new_tokens: int) -> dict:
    """Seconds of greedy generation, prompt included."""
    sizes = shape.config, shape.rows, shape.tokens
    variants = (*OURS, *(v for v in THEIRS if v.kept(*sizes) < ROOM))
    models, ids = loaded(shape.config, variants), token_ids(shape)
    runs = {}
    for variant, model in models.items():
        if variant.attention:
            run = partial(
                model.eval().generate,
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        else:
            run = partial(generate, model, ids, new_tokens, temperature=0)
        runs[variant] = run
    tokens, trial = runs[OURS[0]](), {}
    for variant, run in runs.items():
        trial[variant], found = timed(run)
        if variant.dtype == torch.float32 and not torch.equal(found, tokens):
            return red(shape, f"{variant}: other tokens")
    row, _ = race(runs, shape, trial)
    return {"shape": f"{shape}, {new_tokens} new tokens", **row}


def prefill(shape: Shape) -> dict:
    """Seconds from a prompt to a filled cache and the logits of its last token."""
    variants = (*OURS, *(Variant(dtype, "sdpa", "grouped_mm") for dtype in SAME_LOSS))
    models, ids = loaded(shape.config, variants), token_ids(shape)

    @torch.no_grad()
    def ours(model: KexaForCausalLM) -> Tensor:
        hidden_BTD = model.hidden_states(ids, cache=model.new_cache(shape.rows))
        return model.lm_head(hidden_BTD[:, -1])

    @torch.no_grad()
    def theirs(model: nn.Module) -> Tensor:
        return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    runs = {v: partial(theirs if v.attention else ours, m.eval()) for v, m in models.items()}
    logits, trial = runs[OURS[0]](), {}
    for variant, run in runs.items():
        trial[variant], found = timed(run)
        off = float((found - logits).abs().max())
        if variant.dtype == torch.float32 and off > SAME_LOGITS:
            return red(shape, f"{variant}: logits off by {off:.1e}")
    row, _ = race(runs, shape, trial)
    return {"shape": f"{shape}, prefill", **row}


def long_context(short: int, long: int, rounds: int = 9) -> dict:
    """A decoding step behind ``long`` tokens over one behind ``short``: window layers, and all."""
    model = KexaForCausalLM(CONFIG).eval()
    caches = {length: filled(model.config, length) for length in (short, long)}
    spent = {"window layers": 0.0, "global layers": 0.0}
    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        name = "window layers" if kind == "sliding_attention" else "global layers"
        _time_calls(layer, spent, name)
    token = torch.ones(1, 1, dtype=torch.int64)
    ratios: dict[str, list[float]] = {"window layers": [], "global layers": [], "all": []}
    for _ in tqdm(range(rounds + 1), desc="long context", leave=False):
        seconds = {}
        for length, cache in caches.items():
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.perf_counter()
            with torch.no_grad():
                for _ in range(20):
                    model.lm_head(model.decode(token, cache=cache))
                    cache.roll_back(1)
            seconds[length] = {**spent, "all": time.perf_counter() - start}
        for name, found in ratios.items():
            found.append(seconds[long][name] / seconds[short][name])
    return {
        "shape": f"decoding step at {long} over {short} tokens of context",
        "target": {"window layers": "at most 1.3"},
        "ratio": {name: spread(found[1:]) for name, found in ratios.items()},  # but the first
    }


def cache_bytes(tokens: int) -> dict:
    """Storage of the cache behind ``tokens`` tokens, of all layers and were they all global."""
    every = replace(CONFIG, layer_types=("full_attention",) * CONFIG.num_hidden_layers)
    held = {}
    for name, config in {"hybrid": CONFIG, "all global": every}.items():
        buffers = [b for c in filled(config, tokens).layers for b in (c.key_BGSK, c.value_BGSK)]
        held[name] = sum(b.untyped_storage().nbytes() for b in buffers)
    share = round(held["hybrid"] / held["all global"], 5)
    return {
        "shape": f"cache at {tokens} tokens",
        "bytes": held,
        "share": share,
        "target": "at most 0.251",
    }


def experts(dtype: torch.dtype, target: float, config: ModelConfig, tokens: int) -> dict:
    """Speed of a sparse layer, forward and backward, as a share of a dense product's.

    The layer is all of it: router, dropless routed experts, shared expert. The dense product has as
    many FLOPs in each direction: its matrix has as many rows as a token meets in the layer.
    """
    torch.manual_seed(0)
    layer = SparseMoE(config)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, config.initializer_range)
    layer = layer.to(dtype).train()
    met = config.num_experts_per_tok + config.num_shared_experts
    width = 3 * config.moe_intermediate_size * met + config.num_experts
    dense = nn.Linear(config.hidden_size, width, bias=False, dtype=dtype)
    x = torch.randn(1, tokens, config.hidden_size, dtype=dtype).requires_grad_()
    gradients = {m: torch.randn_like(m(x)) for m in (layer, dense)}

    def step(module: nn.Module) -> None:
        torch.autograd.grad(module(x), (x, *module.parameters()), gradients[module])

    seconds = interleaved({"kexa": partial(step, layer), "dense": partial(step, dense)}, 21)
    ratios = [b / a for a, b in zip(seconds["kexa"], seconds["dense"], strict=True)]
    c = config
    return {
        "shape": f"{tokens} tokens, hidden {c.hidden_size}, {c.num_experts} experts top-"
        f"{c.num_experts_per_tok} x {c.moe_intermediate_size}, {str(dtype).removeprefix('torch.')}",
        "target": target,
        "milliseconds": _milliseconds(seconds),
        "speed over dense": spread(ratios),
    }


def loading(config: ModelConfig) -> dict:
    """Peak memory of a fresh process that reads a checkpoint, over the size of the model."""
    with tempfile.TemporaryDirectory() as folder:
        for code in (_SAVE, _LOAD):
            done = subprocess.run(
                [sys.executable, "-c", code],
                input=pickle.dumps((folder, config)),
                capture_output=True,
                check=True,
            )
    model, imports, peak = map(int, done.stdout.split())
    return {
        "shape": f"checkpoint of {model / 1e9:.2f} GB",
        "megabytes": {
            "model": round(model / 1e6, 1),
            "imports": round(imports / 1e6, 1),
            "peak": round(peak / 1e6, 1),
            "peak over model": round((peak - model) / 1e6, 1),
        },
        "target": "peak less than 300 MB over the model",
    }


def red(shape: Shape, why: str) -> dict:
    """A row without times."""
    return {"shape": str(shape), "red": why}


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def race(
    runs: dict[Variant, Callable[[], Tensor]], shape: Shape, trial: dict[Variant, float]
) -> tuple[dict, list[Variant]]:
    """The fastest of ours and of theirs by ``trial`` in interleaved rounds; which these are."""
    best = [
        min((v for v in runs if bool(v.attention) == theirs), key=trial.get)
        for theirs in (False, True)
    ]
    seconds = interleaved({v: runs[v] for v in best}, shape.rounds)
    ratios = [b / a for a, b in zip(*(seconds[v] for v in best), strict=True)]
    row = {
        "target": shape.target,
        "ratio": spread(ratios),
        "rounds": shape.rounds,
        "milliseconds": _milliseconds(seconds),
        "trial milliseconds": _milliseconds({v: [s] for v, s in trial.items()}),
    }
    return row, best


def interleaved(runs: dict, rounds: int) -> dict[object, list[float]]:
    """Seconds of every run, each once per round in turn."""
    seconds: dict[object, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def loaded(config: ModelConfig, variants: Collection[Variant]) -> dict[Variant, nn.Module]:
    """The same random weights in every variant."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = KexaForCausalLM(config)
        with torch.no_grad():
            for layer in model.moe_layers:
                layer.e_score_correction_bias.normal_(0.0, 0.02)
        save_hf(model, folder)
        return {variant: variant.load(Path(folder)) for variant in variants}


def token_ids(shape: Shape) -> Tensor:
    """Random ids, seeded, without the padding token 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        1, shape.config.vocab_size, (shape.rows, shape.tokens), generator=generator
    )


def filled(config: ModelConfig, tokens: int) -> Cache:
    """A cache that holds ``tokens`` random keys and values, without the model's work on them."""
    cache = Cache(config.layer_types, config.sliding_window, batch_size=1)
    step = cache.begin(1, tokens, None)
    for layer in cache.layers:
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        layer.update(torch.randn(shape), torch.randn(shape), step)
    return cache


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model")
    parser.add_argument("what", choices=tuple(PARTS))
    parser.add_argument("--quick", action="store_true", help="small shapes; writes no results")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for row in PARTS[arguments.what](arguments.quick):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if not arguments.quick:
        found = {
            "device": device_name("cpu"),
            "threads": THREADS,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "commit": commit(),
            "rows": rows,
        }
        folder = results_of(found["device"])
        write_atomic(folder / f"model-{arguments.what}.json", json.dumps(found, indent=1) + "\n")
    return 1 if any("red" in row for row in rows) else 0


def _train(quick: bool) -> Iterator[dict]:
    variants: Collection[Variant] = ()
    for shape in QUICK_TRAINING if quick else TRAINING:
        if not shape.only_winners:
            sizes = shape.config, shape.rows, shape.tokens
            variants = (*OURS, *(v for v in THEIRS if v.kept(*sizes) < ROOM))
        row, winners = training(shape, variants)
        variants = (OURS[0], *(v for v in winners if v != OURS[0]))
        yield row


def _experts(quick: bool) -> Iterator[dict]:
    for (config, tokens), (dtype, target) in itertools.product(LAYERS, EXPERTS):
        yield experts(dtype, target, config, 256 if quick else tokens)


def _decode(quick: bool) -> Iterator[dict]:
    for shape in QUICK_GENERATION if quick else GENERATION:
        yield generation(shape, 8 if quick else NEW_TOKENS)
    yield prefill(replace(PREFILL, tokens=300) if quick else PREFILL)
    yield long_context(256, 1024) if quick else long_context(4096, 65_536)
    yield cache_bytes(4096 if quick else 262_144)


def _load(quick: bool) -> Iterator[dict]:
    yield loading(CONFIG if quick else LOADED)


PARTS = {"train": _train, "experts": _experts, "decode": _decode, "load": _load}

_SAVE = """
import pickle, sys
from kexa.interop import save_hf
from kexa.model import KexaForCausalLM
folder, config = pickle.load(sys.stdin.buffer)
save_hf(KexaForCausalLM(config).bfloat16(), folder)
"""

# The peak that getrusage knows starts at that of the process that started this one.
_LOAD = """
import pickle, re, sys
from pathlib import Path
from kexa.interop import load_hf
folder, config = pickle.load(sys.stdin.buffer)
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
imports = peak()
state = load_hf(folder).state_dict().values()
print(sum(t.numel() * t.element_size() for t in state), imports, peak())
"""


def _train_step(model: nn.Module, ids_BT: Tensor) -> Tensor:
    model.zero_grad()
    if isinstance(model, KexaForCausalLM):
        loss = model.loss(ids_BT, balance_weight=0.0).total
    else:
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    return loss.detach()


def _gradient(model: nn.Module) -> Tensor:
    """All gradients as one vector; both sides have the same names of parameters."""
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])


def _time_calls(module: nn.Module, spent: dict[str, float], name: str) -> None:
    """Add the seconds of every call of ``module`` to ``spent[name]``."""
    started = []
    module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))

    def stop(*_: object) -> None:
        spent[name] += time.perf_counter() - started.pop()

    module.register_forward_hook(stop)


def _milliseconds(seconds: dict) -> dict[str, float]:
    return {str(name): round(1e3 * statistics.median(s), 2) for name, s in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
