"""Do ranks train as one process does? 100 steps on every mesh of two and four, in fp32.

    python -m benchmarks.parallel [--steps 100]

One small model with an MTP block, documents of ragged lengths, Muon and AdamW. For each mesh the
table and ``results/parallel.json`` say how far each part of the loss is from one process's at worst
(relative), how many tokens more or fewer an expert got than there, over all steps and layers, and
whether the balance bias ends the same. Sums are taken in another order on a mesh, so a token whose
second and third best experts score alike may change between them.

Ranks are processes on this machine that talk by gloo. No times: they share its cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from kexa import dist
from kexa.config import ModelConfig, load
from kexa.model import KexaForCausalLM
from kexa.record import commit, write_atomic
from kexa.train import build_optimizers, fit, wsd
from kexa.train.pretrain import training_loss

MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=2,
    sliding_window=8,
    max_position_embeddings=64,
    initializer_range=0.1,
    num_nextn_predict_layers=1,
)
TRAINING = dataclasses.replace(
    load("smoke").pretrain,
    learning_rate=3e-3,
    weight_decay=0.1,
    mtp_weight=0.05,
    balance_weight=1e-4,
)
ROWS, LENGTH = 8, 16
MESHES = ((2, 1), (1, 2), (4, 1), (1, 4), (2, 2))
TOLERANCE = 1e-5
RESULTS = Path(__file__).parent / "results" / "parallel.json"


def batch_at(step: int) -> dict[str, torch.Tensor]:
    """Counting upwards from a random number, in documents of ragged lengths: it can be learned."""
    generator = torch.Generator().manual_seed(step)
    chance = torch.linspace(0.02, 0.5, ROWS)[:, None]
    documents = (torch.rand(ROWS, LENGTH, generator=generator) < chance).long().cumsum(1)
    start = torch.randint(256, (ROWS, LENGTH + 1), generator=generator).gather(1, documents)
    return {
        "input_ids": (start + torch.arange(LENGTH)) % 256,
        "document_ids": documents,
    }


def train(fsdp: int, ep: int, steps: int) -> dict[str, Any]:
    """Losses, expert counts and final bias of a run on a mesh; all ranks give the same."""
    torch.set_num_threads(1)
    layout = dist.join(fsdp, ep, torch.device("cpu"))
    torch.manual_seed(0)
    model = dist.shard(KexaForCausalLM(MODEL), layout)
    optimizers = build_optimizers(model, TRAINING)
    schedule = functools.partial(wsd, steps=steps, warmup_share=0.05, decay_share=0.3)
    loss = functools.partial(training_loss, config=TRAINING, layout=layout)
    records = list(fit(model, optimizers, batch_at, loss, steps, schedule))
    dist.leave()
    return {
        "losses": [r.losses for r in records],
        "load": [r.expert_load for r in records],
        "bias": [layer.e_score_correction_bias.tolist() for layer in model.moe_layers],
    }


def compare(ranks: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """How far a run on ranks is from the one on one process."""
    worst = {
        part: max(
            abs(a[part] - b[part]) / abs(b[part])
            for a, b in zip(ranks["losses"], one["losses"], strict=True)
        )
        for part in one["losses"][0]
    }
    moved = (torch.tensor(ranks["load"]) - torch.tensor(one["load"])).abs().sum().item() / 2
    same_bias = ranks["bias"] == one["bias"]
    return {
        "worst relative difference": worst,
        "tokens at other experts": moved,
        "same bias": same_bias,
        "holds": max(worst.values()) <= TOLERANCE and not moved and same_bias,
    }


def main() -> int:
    """Run every mesh, print the table, write the results; 1 if a mesh is not within tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    steps = parser.parse_args().steps
    one = train(1, 1, steps)
    first, last = (one["losses"][i]["next_token"] for i in (0, -1))
    print(f"one process: next-token loss {first:.3f} -> {last:.3f} nats in {steps} steps")
    rows = {}
    for fsdp, ep in MESHES:
        with tempfile.TemporaryDirectory() as directory:
            with dist.meeting_place() as meeting:
                given = (fsdp, ep, steps, meeting, directory)
                torch.multiprocessing.spawn(_rank, given, fsdp * ep)
            runs = [json.loads(path.read_text()) for path in sorted(Path(directory).iterdir())]
        assert all(run == runs[0] for run in runs), "the ranks disagree with each other"
        row = rows[f"fsdp {fsdp} x ep {ep}"] = compare(runs[0], one)
        worst = ", ".join(f"{k} {v:.1e}" for k, v in row["worst relative difference"].items())
        print(
            f"fsdp {fsdp} x ep {ep}: {worst}; {row['tokens at other experts']:.0f} tokens at other "
            f"experts; bias the same: {row['same bias']}"
        )
    results = {
        "commit": commit(),
        "torch": torch.__version__,
        "steps": steps,
        "tolerance": TOLERANCE,
        "one process": {"first next-token loss": first, "last next-token loss": last},
        "meshes": rows,
    }
    write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
    return int(not all(row["holds"] for row in rows.values()))


def _rank(
    rank: int, fsdp: int, ep: int, steps: int, meeting: dict[str, str], directory: str
) -> None:
    os.environ |= meeting | {"RANK": str(rank), "WORLD_SIZE": str(fsdp * ep)}
    write_atomic(Path(directory) / f"{rank}.json", json.dumps(train(fsdp, ep, steps)))


if __name__ == "__main__":
    raise SystemExit(main())
