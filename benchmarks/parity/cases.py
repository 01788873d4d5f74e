"""What is compared, as generators of named cases.

    transformers   a checkpoint written by ``save_hf``, read there; odd lengths past three windows
    packed         documents packed into one row, padding behind them, with each document alone
    prefill        a prompt read in chunks with one pass: every chunking of a short prompt that the
                   cache allows, some of a long one, whose second row begins with padding
    decode         ragged rows decoded around a wrap of the rings, with one pass over each row;
                   every call also writes wrong tokens, which are then taken back
    mtp            the MTP block with a reference in NumPy: packed, its loss, and cached

The error of a case is the largest difference of two logits (of a loss: of the two losses). All but
the first need :func:`benchmarks.parity.configs.all_in_fp64`.

Legend: B rows, T tokens, V vocabulary, R rounds.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parity.configs import random_model
from kexa.interop import published_tensors, save_hf
from kexa.model import KexaForCausalLM
from tests.model.mtp_reference import mtp_logits

WRAPS = range(6)
ROLLBACKS = range(5)
Cases = Iterator[tuple[str, Callable[[], float]]]  # a name, and a comparison that gives the error


@dataclass(frozen=True)
class Rows:
    """Rows of tokens with their logits in one pass, without padding and without a cache."""

    model: KexaForCausalLM
    ids_BT: Tensor
    logits_BTV: Tensor


def random_rows(seed: int, rows: int, tokens: int) -> Rows:
    model = random_model(seed)
    ids_BT = random_ids(model, rows, tokens)
    return Rows(model, ids_BT, model(ids_BT))


def random_ids(model: KexaForCausalLM, *shape: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, shape)


def transformers_cases(seed: int, dtype: torch.dtype) -> Cases:
    model = random_model(seed, dtype)
    beyond = 3 * model.config.sliding_window + random.Random(seed).randint(1, 8)
    ids_BT = random_ids(model, 2, beyond | 1)  # an odd number of tokens
    yield f"{beyond | 1} tokens", partial(meets_transformers, model, ids_BT, dtype)


def meets_transformers(model: KexaForCausalLM, ids_BT: Tensor, dtype: torch.dtype) -> float:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, folder)
        # Its default expert path refuses fp64, and its eager attention takes the softmax in fp32.
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation="eager", attn_implementation="sdpa"
        )
    ours_BTV = model(ids_BT)
    assert ours_BTV.std() > 0.1  # else agreement says nothing
    return difference(ours_BTV, theirs(ids_BT).logits)


def packed_cases(seed: int) -> Cases:
    model, choose = random_model(seed), random.Random(seed)
    most = 3 * model.config.sliding_window + 1
    for _ in range(4):
        lengths = [choose.randint(1, most) for _ in range(choose.randint(2, 4))]
        padding = choose.randint(0, 3)
        ids_BT = random_ids(model, 2, sum(lengths) + padding)
        name = f"documents {plus(lengths)}, padding {padding}"
        yield name, partial(packed_meets_separate, model, ids_BT, lengths)


def packed_meets_separate(model: KexaForCausalLM, ids_BT: Tensor, lengths: list[int]) -> float:
    """The second row holds documents of the same lengths in reverse."""
    rows = (lengths, lengths[::-1])
    documents_BT = torch.stack([document_ids(row, ids_BT.shape[1]) for row in rows])
    packed_BTV = model(ids_BT, documents_BT)
    return largest(
        difference(packed_TV, model(alone_T[None])[0])
        for ids_T, logits_TV, row in zip(ids_BT, packed_BTV, rows, strict=True)
        for alone_T, packed_TV in zip(parts(ids_T, row), parts(logits_TV, row), strict=True)
    )


def prefill_cases(seed: int) -> Cases:
    choose = random.Random(seed)
    window = random_model(seed).config.sliding_window
    long = (3 * window + choose.randint(8, 15)) | 1
    rows = random_rows(seed, 2, long)

    def case(sizes: list[int], chunk: int, padding: int):
        name = f"sizes {plus(sizes)}, chunk {chunk}, padding {padding}"
        return name, partial(chunks_meet_one_pass, rows, sizes, chunk, torch.tensor([0, padding]))

    for first in range(1, 7):
        yield from (case([first, *rest], 2, 0) for rest in compositions(6 - first, 2))
    yield case([1] * long, 1, 0)
    for _ in range(3):
        chunk, sizes = choose.randint(1, 6), [choose.randint(1, long)]
        while (left := long - sum(sizes)) > 0:
            sizes.append(choose.randint(1, min(chunk, left)))
        yield case(sizes, chunk, choose.randrange(sizes[0]))


def compositions(number: int, most: int) -> Iterator[list[int]]:
    """Every way to write ``number`` as a sum of numbers from 1 to ``most``, in order."""
    if number == 0:
        yield []
    for first in range(1, min(number, most) + 1):
        yield from ([first, *rest] for rest in compositions(number - first, most))


def chunks_meet_one_pass(rows: Rows, sizes: list[int], chunk: int, padding_B: Tensor) -> float:
    tokens, cache = sum(sizes), rows.model.new_cache(len(rows.ids_BT), chunk)
    first_BT, *later = left_padded(rows.ids_BT, padding_B, tokens).split(sizes, dim=1)
    logits = [rows.model(first_BT, padding_ids(padding_B, sizes[0]), cache)]
    logits += [rows.model(part_BT, cache=cache) for part_BT in later]
    read_BTV = torch.cat(logits, dim=1)
    return largest(
        difference(read_TV[pad:], whole_TV[: tokens - pad])
        for read_TV, whole_TV, pad in zip(
            read_BTV, rows.logits_BTV, padding_B.tolist(), strict=True
        )
    )


def decode_cases(seed: int) -> Cases:
    choose = random.Random(seed)
    window, most = random_model(seed).config.sliding_window, 1 + ROLLBACKS[-1]
    rows = random_rows(seed, 3, WRAPS[-1] * (window + most) + 5 * most)
    for wraps in WRAPS:
        for rollback in ROLLBACKS:
            ring = window + 1 + rollback
            # Row 0 goes on by one token a round. It ends on the second slot of its wrap.
            if wraps:
                before = choose.randint(1, min(3, ring - 1))
                columns, rounds = wraps * ring - before, before + 2
            else:
                columns = choose.randint(1, ring - 1)
                rounds = min(3, ring - columns)
            padding = [0, choose.randrange(columns), choose.randrange(columns)]
            padding_B = torch.tensor(choose.sample(padding, 3))
            right_RB = torch.randint(1, 2 + rollback, (rounds, 3))
            right_RB[:, 0] = 1
            compare = partial(decoding_meets_one_pass, rows, columns, padding_B, right_RB)
            yield f"wraps {wraps}, rollback {rollback}", partial(compare, rollback)


def decoding_meets_one_pass(
    rows: Rows, columns: int, padding_B: Tensor, right_RB: Tensor, rollback: int
) -> float:
    """Each round writes ``1 + rollback`` tokens per row: ``right_RB`` right ones, then wrong ones.

    ``columns`` of prompt and padding come first.
    """
    model, chunk = rows.model, 1 + rollback
    cache = model.new_cache(len(rows.ids_BT), chunk)
    prompt_BT = left_padded(rows.ids_BT, padding_B, columns)
    read_BTV = model(prompt_BT, padding_ids(padding_B, columns), cache)
    known_B = columns - padding_B
    batch = torch.arange(len(known_B))
    errors = [difference(read_BTV[:, -1], rows.logits_BTV[batch, known_B - 1])]
    for right_B in right_RB:
        column_BT = known_B[:, None] + torch.arange(chunk)
        true_BT = rows.ids_BT.gather(1, column_BT)
        is_right_BT = torch.arange(chunk) < right_B[:, None]
        wrong_BT = (true_BT + 1) % model.config.vocab_size
        logits_BTV = model(torch.where(is_right_BT, true_BT, wrong_BT), cache=cache)
        whole_BTV = rows.logits_BTV[batch[:, None], column_BT]
        errors.append(difference(logits_BTV[is_right_BT], whole_BTV[is_right_BT]))
        cache.roll_back(chunk - right_B)
        known_B = known_B + right_B
    return largest(errors)


def mtp_cases(seed: int) -> Cases:
    """None where the config has no MTP block."""
    model, choose = random_model(seed), random.Random(seed)
    if model.mtp is None:
        return
    lengths = choose.sample([*(choose.randint(1, 9) for _ in range(3)), choose.randint(3, 9)], 4)
    padding = choose.randint(0, 2)
    ids_T = random_ids(model, sum(lengths) + padding)
    name = f"documents {plus(lengths)}, padding {padding}"
    yield name, partial(mtp_meets_reference, model, ids_T, lengths)
    yield f"loss, {name}", partial(mtp_loss_meets_reference, model, ids_T, lengths)
    tokens, chunk = choose.randint(8, 13), choose.randint(1, 4)
    sizes = choose.choice(list(compositions(tokens - 1, chunk)))
    name = f"cached, sizes {plus(sizes)}, chunk {chunk}"
    yield name, partial(cached_mtp_meets_reference, model, random_ids(model, tokens), sizes, chunk)


def mtp_meets_reference(model: KexaForCausalLM, ids_T: Tensor, lengths: list[int]) -> float:
    ids_BT, documents_BT = ids_T[None], document_ids(lengths, len(ids_T))[None]
    hidden_BTD = model.hidden_states(ids_BT, documents_BT)
    ahead_BTD = model.mtp_hidden_states(ids_BT[:, 1:], hidden_BTD[:, :-1], documents_BT[:, :-1])
    # At its last token a document reads the next one's first, and predicts nothing.
    inside_T = (documents_BT[0, 1:] == documents_BT[0, :-1]) & (documents_BT[0, 1:] >= 0)
    expected = [reference_logits(model, alone_T) for alone_T in parts(ids_T, lengths)]
    return difference(model.lm_head(ahead_BTD)[0, inside_T], torch.cat(expected))


def mtp_loss_meets_reference(model: KexaForCausalLM, ids_T: Tensor, lengths: list[int]) -> float:
    nats = [
        F.cross_entropy(reference_logits(model, alone_T)[:-1], alone_T[2:], reduction="none")
        for alone_T in parts(ids_T, lengths)
    ]
    loss = model.loss(ids_T[None], document_ids(lengths, len(ids_T))[None])
    return difference(loss.mtp, torch.cat(nats).mean())


def cached_mtp_meets_reference(
    model: KexaForCausalLM, ids_T: Tensor, sizes: list[int], chunk: int
) -> float:
    hidden_BTD, cache = model.hidden_states(ids_T[None]), model.new_mtp_cache(1, chunk)
    pairs = zip(ids_T[None, 1:].split(sizes, 1), hidden_BTD[:, :-1].split(sizes, 1), strict=True)
    ahead = [model.mtp_hidden_states(*pair, cache=cache) for pair in pairs]
    ours_TV = model.lm_head(torch.cat(ahead, dim=1))[0]
    return difference(ours_TV, reference_logits(model, ids_T))


def reference_logits(model: KexaForCausalLM, ids_T: Tensor) -> Tensor:
    """``[T - 1, V]`` of one document, from the main model's own hidden states."""
    tensors = published_tensors(model.state_dict())
    weights = {name: tensor.numpy() for name, tensor in tensors.items()}
    hidden_TD = model.hidden_states(ids_T[None])[0].numpy()
    config = model.config
    logits = mtp_logits(weights, ids_T.tolist(), hidden_TD, config.head_dim, config.rms_norm_eps)
    return torch.from_numpy(logits).view(-1, config.vocab_size)


def document_ids(lengths: list[int], tokens: int) -> Tensor:
    """``[T]``: 0, 1, ... along the documents, -1 on the padding behind them."""
    ids_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return F.pad(ids_T, (0, tokens - len(ids_T)), value=-1)


def parts(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """The documents of a packed row, or what belongs to their tokens, without the padding."""
    return x[: sum(lengths)].split(lengths)


def left_padded(ids_BT: Tensor, padding_B: Tensor, columns: int) -> Tensor:
    """The beginnings of the rows, each behind so much padding that it fills ``columns``."""
    pads = padding_B.tolist()
    return torch.stack(
        [F.pad(ids_T[: columns - n], (n, 0)) for ids_T, n in zip(ids_BT, pads, strict=True)]
    )


def padding_ids(padding_B: Tensor, columns: int) -> Tensor:
    """Document ids of left-padded rows: -1 on the padding, 0 on the tokens."""
    return -(torch.arange(columns) < padding_B[:, None]).long()


def plus(numbers: list[int]) -> str:
    return "+".join(map(str, numbers))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest; NaN where there is one."""
    assert a.shape == b.shape, f"{tuple(a.shape)} and {tuple(b.shape)} do not compare"
    return float((a - b).abs().max())


def largest(errors: Iterator[float] | list[float]) -> float:
    """NaN if one of them is, which Python's ``max`` may lose."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())
