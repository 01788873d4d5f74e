"""Tokenizers compared by what a small model learns with each from the same text.

A token that holds more bytes is harder to predict, so compression alone proves nothing. What can be
compared is the information that a model needs for the held-out text itself:

    bits per byte = sum over all tokens of -log2 p(token | tokens before it) / UTF-8 bytes

Everything is counted in bytes of text. Both models read the same documents once, in the same order,
in the same number of steps; a row covers ``row_bytes`` bytes on average, so it is shorter in tokens
where the tokenizer is better, and its model does less work. Held-out documents are cut into
passages of at most ``row_bytes`` bytes *before* they are tokenised: each passage is scored from
``[BOS]`` on, so that both models see the same bytes before a byte, and every byte counts once.

The models are equal but for the rows of embedding and head, one per token: with one seed all other
parameters start from the same values. A larger vocabulary has more parameters there, which is part
of its price and its use.

chosen: all of it; the report compares bytes per token only. A tokenizer that rewrites text (the
baseline's NFKC makes ``ﬁ`` of two letters) has less to predict; bytes are those of the text as
given, so that the comparison leans towards it.

Legend: B rows, T tokens, N targets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kexa import runtime
from kexa.config import ComparisonConfig, ModelConfig
from kexa.data import Document, Mixture, encode
from kexa.model import KexaForCausalLM
from kexa.statistics import Interval
from kexa.train.checkpoint import identity
from kexa.train.optim import role
from kexa.train.pretrain import new_model
from kexa.train.short_run import short_run

PASSAGES = 32  # scored at once
RESAMPLES = 1000
VOCABULARY = ("embed_tokens", "lm_head")  # roles of the parameters that have a row per token


def first_bytes(documents: Sequence[Document], size: int) -> list[Document]:
    """The first documents that fit into ``size`` UTF-8 bytes together, in order.

    Raises:
        ValueError: not one of them fits.
    """
    total, kept = 0, []
    for document in documents:
        if total + document.bytes <= size:
            total += document.bytes
            kept.append(document)
    if not kept:
        raise ValueError(f"no document has at most {size} bytes; raise the number of bytes")
    return kept


def passages(text: str, size: int) -> list[str]:
    """The text in pieces of at most ``size`` UTF-8 bytes, cut before a space where there is one.

    A cut is looked for in the second half of a piece; without a space there it falls between two
    characters. Joined, the pieces are the text.

    Raises:
        ValueError: ``size`` below 4, the longest character.
    """
    if size < 4:
        raise ValueError(f"passages of {size} bytes cannot hold every character; use at least 4")
    data, pieces, start = text.encode("utf-8"), [], 0
    while start < len(data):
        end = min(start + size, len(data))
        if end < len(data):
            while data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            space = data.rfind(b" ", start + size // 2, end)
            end = space if space > start else end
        pieces.append(data[start:end].decode("utf-8"))
        start = end
    return pieces


def paired_model(config: ModelConfig, seed: int) -> KexaForCausalLM:
    """A new model whose initial values do not depend on the vocabulary, outside of its rows."""
    model = new_model(config, seed)
    shared = new_model(dataclasses.replace(config, vocab_size=1), seed).state_dict()
    kept = {name: value for name, value in shared.items() if role(name) not in VOCABULARY}
    model.load_state_dict(kept, strict=False)
    return model


def parameter_counts(model: KexaForCausalLM) -> tuple[int, int]:
    """Parameters in the rows of the vocabulary, and all others."""
    rows = sum(p.numel() for name, p in model.named_parameters() if role(name) in VOCABULARY)
    return rows, sum(p.numel() for p in model.parameters()) - rows


def packed(
    tokenizer: Tokenizer, documents: Sequence[Document], config: ComparisonConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """All documents in ``steps * batch_size`` rows: ``input_ids``, ``document_ids``, int64 [B, T].

    Their order depends on the seed only. Rows are as long in tokens as it takes; the last one is
    filled up from the first documents.
    """
    tokens = encode(tokenizer, documents)
    rows = config.steps * config.batch_size
    length = math.ceil(len(tokens.tokens) / rows)
    return Mixture({"all": tokens}, {"all": 1.0}, length, rows, seed).batch(0)


def train_with(
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    config: ComparisonConfig,
    seed: int,
    device: torch.device,
    checkpoint_dir: Path | None = None,
    description: str = "train",
) -> KexaForCausalLM:
    """A small model that has read ``documents`` once, in ``config.steps`` steps.

    Args:
        documents: see :func:`first_bytes`.
        seed: of initial values and of the order of the documents.
        checkpoint_dir: a finished run found there is not repeated.
    """
    input_ids, document_ids = packed(tokenizer, documents, config, seed)
    order = torch.randperm(len(input_ids), generator=runtime.generator(seed, "rows"))
    batches = order.view(config.steps, config.batch_size)
    shape = dataclasses.replace(config.model, vocab_size=tokenizer.get_vocab_size())
    model = paired_model(shape, seed).to(device)

    def batch_at(step: int) -> dict[str, Tensor]:
        rows = batches[step]  # of many documents: a long one fills rows in a row
        return {"input_ids": input_ids[rows], "document_ids": document_ids[rows]}

    short_run(
        model,
        batch_at,
        config.steps,
        config,
        0.0,
        checkpoint_dir,
        identity(model=model.config, comparison=config, seed=seed),
        description,
    )
    return model


@torch.no_grad()
def document_bits(
    model: KexaForCausalLM, tokenizer: Tokenizer, documents: Sequence[Document], size: int
) -> np.ndarray:
    """Bits of each document under the model: float64 [documents].

    Args:
        size: bytes of a passage at most; see :func:`passages`.
    """
    pieces, owners = [], []
    for i, document in enumerate(documents):
        for piece in passages(document.text, size):
            pieces.append(dataclasses.replace(document, text=piece))
            owners.append(i)
    tokens = encode(tokenizer, pieces)
    order = np.argsort(np.diff(tokens.offsets), kind="stable")  # rows of one batch: little padding
    was_training = model.training
    model.eval()
    device = model.lm_head.weight.device
    nats = np.zeros(len(documents))
    for start in range(0, len(order), PASSAGES):
        batch = order[start : start + PASSAGES]
        rows = [torch.from_numpy(tokens.document(i).astype(np.int64)) for i in batch]
        ids_BT = pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
        real_BT = ids_BT >= 0
        hidden_BTD = model.hidden_states(ids_BT.clamp(min=0), real_BT.long() - 1)
        counted_BT = real_BT[:, 1:]
        logits_NV = model.lm_head(hidden_BTD[:, :-1][counted_BT]).float()
        losses_N = F.cross_entropy(logits_NV, ids_BT[:, 1:][counted_BT], reduction="none")
        parts = losses_N.double().split(counted_BT.sum(1).tolist())
        np.add.at(nats, [owners[i] for i in batch], [float(part.sum()) for part in parts])
    model.train(was_training)
    return nats / math.log(2)


def bits_per_byte_interval(
    before: np.ndarray, after: np.ndarray, sizes: np.ndarray, categories: np.ndarray, seed: int
) -> Interval:
    """Difference in bits per byte, ``sum(after - before) / sum(sizes)``, with its 95% interval.

    Below zero: ``after`` needs fewer bits. The interval is a percentile bootstrap over documents,
    both measured on the same ones. Each category is resampled by itself, because how much text of
    each there is was chosen. It says nothing of other initial values.

    Args:
        before, after: bits by document. sizes: UTF-8 bytes by document.
        categories: the category of each document.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((RESAMPLES, len(sizes)))
    for category in np.unique(categories):
        members = np.flatnonzero(categories == category)
        share = np.full(len(members), 1 / len(members))
        weights[:, members] = rng.multinomial(len(members), share, size=RESAMPLES)
    low, high = np.quantile((weights @ (after - before)) / (weights @ sizes), [0.025, 0.975])
    return Interval(float((after - before).sum() / sizes.sum()), float(low), float(high))
