"""Self-drafting of a trained model: how often drafts stand, when they pay, that nothing changes.

python -m benchmarks.drafting runs/laptop/04_pretraining/model --profile laptop

    identity     greedy completions with and without drafts, in ragged batches of 1 to 8 prompts
                 whose lengths run from 1 to twice the window
    chi-square   the second new token after one prompt, sampled with drafts, against its exact
                 distribution over all first tokens
    acceptance   share of drafts accepted by temperature, domain and place in the continuation
    speed        tokens/s with drafts over tokens/s without, by batch size and temperature, in turns
                 within one process: drafting always, and under the rule with measured break-even

The model directory holds a tokenizer (``save_hf``); prompts are cut from the held-out documents of
the profile's corpus. Intervals of shares are Wilson's for independent drafts; drafts within one
text are not, so they are too narrow. Exits with 1 if identity or the chi-square test fails, and
then measures no speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from benchmarks.__main__ import device_name, results_of, spread
from kexa import tokenizer
from kexa.config import load
from kexa.data import TokenizedDocuments, encode, load_corpus
from kexa.interop import load_hf
from kexa.model import (
    DraftRule,
    KexaForCausalLM,
    measure_break_even,
    sample,
    sample_with_stats,
)
from kexa.model.sampling import probabilities
from kexa.record import commit, write_atomic
from kexa.statistics import wilson

BATCH_SIZES = (1, 2, 4, 8, 16)
TEMPERATURES = (0.0, 0.7, 1.0)
ROUNDS = 9
PLACES = 6  # parts of a continuation that acceptance is told for
SIGNIFICANCE = 0.001


class Prompt(NamedTuple):
    """Token ids from a held-out document, and the category of its text."""

    ids: list[int]
    domain: str


def cut_prompts(texts: Mapping[str, TokenizedDocuments], window: int, count: int) -> list[Prompt]:
    """Starts of documents, domain by domain in turn, of lengths 1 to ``2 * window``, over and over.

    Raises:
        ValueError: no document of a domain is long enough.
    """
    starts = {}
    for domain, text in texts.items():
        bounds = zip(text.offsets, text.offsets[1:], strict=False)
        long = [int(s) for s, e in bounds if e - s >= 2 * window]
        if not long:
            raise ValueError(f"no held-out document of {domain} has {2 * window} tokens")
        starts[domain] = itertools.cycle(long)
    lengths = itertools.cycle(range(1, 2 * window + 1))
    prompts = []
    for domain, length in zip(itertools.cycle(texts), lengths, strict=False):
        if len(prompts) == count:
            return prompts
        start = next(starts[domain])
        prompts.append(Prompt(texts[domain].tokens[start : start + length].tolist(), domain))
    return prompts


def identity(model: KexaForCausalLM, prompts: list[Prompt], new_tokens: int) -> dict:
    """How many greedy completions are equal with and without drafts, and the first that are not."""
    left, sizes = iter(p.ids for p in prompts), itertools.cycle(range(1, 9))
    different, progress = [], tqdm(total=len(prompts), desc="identity", leave=False)
    while group := list(itertools.islice(left, next(sizes))):
        plain, drafted = (
            sample(model, group, new_tokens, 0.0, self_draft=draft) for draft in (False, True)
        )
        for ids, a, b in zip(group, plain, drafted, strict=True):
            if a.tokens != b.tokens:
                at = next(i for i in range(new_tokens) if a.tokens[i] != b.tokens[i])
                different.append({"prompt_tokens": len(ids), "rows": len(group), "at": at})
        progress.update(len(group))
    progress.close()
    return {
        "prompts": len(prompts),
        "equal": len(prompts) - len(different),
        "prompt_tokens": [min(len(p.ids) for p in prompts), max(len(p.ids) for p in prompts)],
        "rows": [1, 8],
        "new_tokens": new_tokens,
        "first_different": different[:10],
    }


@torch.inference_mode()
def chi_square(model: KexaForCausalLM, ids: list[int], draws: int, seed: int = 0) -> dict:
    """Pearson's test of the second new token at temperature 1; rare tokens are one cell."""
    drafted = torch.zeros(model.config.vocab_size, dtype=torch.float64)
    generator, tried, accepted = torch.Generator().manual_seed(seed), 0, 0
    sizes = [1000] * (draws // 1000) + [draws % 1000] * (draws % 1000 > 0)
    for size in tqdm(sizes, desc="chi-square", leave=False):
        found, stats = sample_with_stats(
            model, [ids] * size, 2, 1.0, generator=generator, batch_size=size
        )
        second = torch.tensor([completion.tokens[1] for completion in found])
        drafted += second.bincount(minlength=len(drafted))
        tried, accepted = tried + stats.drafted, accepted + stats.accepted
    device, vocabulary = model.lm_head.weight.device, model.config.vocab_size
    prompt_1T = torch.tensor([ids], device=device)
    first_V = probabilities(model(prompt_1T)[:, -1], 1.0, 1.0)[0].double()
    expected_V = torch.zeros_like(first_V)
    for part in torch.arange(vocabulary, device=device).split(256):
        x = torch.cat((prompt_1T.expand(len(part), -1), part[:, None]), dim=1)
        expected_V += first_V[part] @ probabilities(model(x)[:, -1], 1.0, 1.0).double()
    expected = expected_V.cpu() / expected_V.sum().cpu() * draws
    common = expected >= 5
    cells = [torch.cat((x[common], x[~common].sum()[None])) for x in (drafted, expected)]
    kept = cells[1] > 0
    statistic = float((((cells[0] - cells[1]) ** 2 / cells[1])[kept]).sum())
    degrees = int(kept.sum()) - 1
    return {
        "draws": draws,
        "acceptance": round(accepted / tried, 3),
        "statistic": round(statistic, 1),
        "degrees": degrees,
        "p": upper_tail(statistic, degrees),
    }


def upper_tail(statistic: float, degrees: int) -> float:
    """P(chi-square >= statistic), by Wilson and Hilferty's cube root (good to 0.001 from 3 on)."""
    part = 2 / (9 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1 - part)) / math.sqrt(part)
    return 1 - NormalDist().cdf(z)


def acceptance(
    model: KexaForCausalLM, prompts: list[Prompt], new_tokens: int, temperature: float
) -> dict:
    """Accepted drafts: in all, by domain, and by place of the draft in the continuation."""
    generator = torch.Generator().manual_seed(0)
    _, stats = sample_with_stats(
        model, [p.ids for p in prompts], new_tokens, temperature, generator=generator
    )
    position_QT, domains = stats.position_QT, sorted({p.domain for p in prompts})
    later = new_tokens - 1  # the first new token is never a draft
    edges = [1 + round(i * later / PLACES) for i in range(PLACES + 1)]
    return {
        "temperature": temperature,
        "all": _share(position_QT),
        "domain": {
            domain: _share(position_QT[[p.domain == domain for p in prompts]]) for domain in domains
        },
        "position": {
            f"{start}-{end - 1}": _share(position_QT[:, start:end])
            for start, end in itertools.pairwise(edges)
            if end > start
        },
    }


def _share(position: torch.Tensor) -> list[float] | None:
    """Share accepted with its 95% interval; None where nothing was drafted."""
    drafted = int((position >= 0).sum())
    if drafted == 0:
        return None
    return [round(x, 4) for x in wilson(int((position == 1).sum()), drafted)]


def speed(
    model: KexaForCausalLM,
    prompts: list[Prompt],
    new_tokens: int,
    temperature: float,
    rounds: int = ROUNDS,
) -> list[dict]:
    """Per batch size: break-even, acceptance, and tokens/s over those of plain decoding."""
    longest = max(len(p.ids) for p in prompts)
    break_even = measure_break_even(model, BATCH_SIZES, longest, temperature)
    rule, rows = DraftRule(break_even), []
    for size in BATCH_SIZES:
        ids = [p.ids for p in prompts[: 2 * size]]  # two batches
        candidates = {"plain": False, "rule": rule, "always": True}

        def run(draft: bool | DraftRule, ids=ids, size=size):
            generator = torch.Generator().manual_seed(0)
            return sample_with_stats(
                model, ids, new_tokens, temperature, 1.0, (), generator, size, draft
            )[1]

        stats = {name: run(draft) for name, draft in candidates.items()}  # and warm up
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in tqdm(range(rounds), desc=f"batch {size}, T={temperature}", leave=False):
            for name, draft in candidates.items():
                seconds[name].append(_seconds(run, draft))
        total = len(ids) * new_tokens
        rows.append(
            {
                "batch": size,
                "temperature": temperature,
                "break_even": round(break_even[size], 3),
                "acceptance": _share(stats["always"].position_QT),
                "drafted_rounds": stats["rule"].drafted_rounds,
                "tokens/s": {n: round(total / statistics.median(s), 1) for n, s in seconds.items()},
                "ratio": {
                    name: spread([a / b for a, b in zip(seconds["plain"], s, strict=True)])
                    for name, s in seconds.items()
                    if name != "plain"
                },
            }
        )
    return rows


def _seconds(run: Callable, draft: bool | DraftRule) -> float:
    start = time.perf_counter()
    run(draft)  # ends with the tokens on the CPU
    return time.perf_counter() - start


def table(found: dict) -> str:
    """The speed rows as Markdown."""
    lines = [
        "| batch | temperature | break-even | acceptance | rule / plain | always / plain |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["speed"]:
        share = "{:.2f} [{:.2f}, {:.2f}]".format(*row["acceptance"])
        ratios = " | ".join(
            "{median:.2f} ({low:.2f}-{high:.2f})".format(**row["ratio"][name])
            for name in ("rule", "always")
        )
        lines.append(
            f"| {row['batch']} | {row['temperature']} | {row['break_even']:.2f} | {share} "
            f"| {ratios} |"
        )
    return "\n".join(lines) + "\n"


def results(
    model: KexaForCausalLM,
    texts: Mapping[str, TokenizedDocuments],
    count: int,
    new_tokens: int,
    draws: int,
    rounds: int = ROUNDS,
) -> dict:
    """All four parts, printed as they are done; no speed where a check fails."""
    window = model.config.sliding_window
    prompts = cut_prompts(texts, window, count)
    found: dict = {"window": window, "new_tokens": new_tokens}
    found["identity"] = identity(model, prompts, new_tokens)
    print(found["identity"])
    found["chi_square"] = chi_square(model, prompts[min(window, count) - 1].ids, draws)
    print(found["chi_square"])
    holds = found["identity"]["equal"] == count and found["chi_square"]["p"] >= SIGNIFICANCE
    found["checks_hold"] = holds
    found["acceptance"] = []
    for temperature in TEMPERATURES:
        found["acceptance"].append(acceptance(model, prompts, new_tokens, temperature))
        print(found["acceptance"][-1])
    found["speed"] = []
    if holds:
        for temperature in TEMPERATURES:
            found["speed"] += speed(model, prompts, new_tokens, temperature, rounds)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafting")
    parser.add_argument("model", help="directory with config.json, weights and tokenizer.json")
    parser.add_argument("--profile", default="laptop", help="whose held-out texts are continued")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draws", type=int, default=100_000, help="of the chi-square test")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing, in turns")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_hf(arguments.model).to(device).eval()
    if model.mtp is None:
        parser.error(f"{arguments.model} has no MTP block to draft with")
    vocabulary = tokenizer.load(arguments.model)
    heldout = load_corpus(load(arguments.profile).data).heldout
    texts = {domain: encode(vocabulary, documents) for domain, documents in heldout.items()}
    found = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "profile": arguments.profile,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "rounds": arguments.rounds,
        **results(
            model,
            texts,
            arguments.prompts,
            arguments.new_tokens,
            arguments.draws,
            arguments.rounds,
        ),
    }
    folder = results_of(found["device"])
    write_atomic(folder / "drafting.json", json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0 if found["checks_hold"] else 1


if __name__ == "__main__":
    sys.exit(main())
