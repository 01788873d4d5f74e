"""Supervised fine-tuning data: two modes, packed, with loss on what the assistant says.

    tasks with worked reasoning      -> think block and answer       (reasoning mode)
    the same kinds of task, answer only; dialogues; tool use         (non-reasoning mode)

reported: SFT precedes reinforcement learning; EXAONE 4.0, whose pipeline it inherits, mixes
reasoning and non-reasoning tokens 1.5 : 1. inferred: one model serves both modes, told apart by an
open or an empty think block. chosen: the ratio counts tokens that carry loss; conversations are
packed whole into rows and never see each other; a conversation longer than a row is left out.

B rows of a batch   T positions
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor

from kexa.data import sources
from kexa.data.chat import Message, encode_chat
from kexa.model import KexaForCausalLM, Loss

_DIALOGUE_FOLDERS = {
    "english": "en",
    "korean": "ko",
    "spanish": "es",
    "german": "de",
    "japanese": "ja",
}


@dataclass(frozen=True)
class Example:
    """One conversation to learn from; ``kind`` says where it comes from."""

    kind: str
    language: str
    messages: Sequence[Message]
    tools: Sequence[Mapping] | None = None

    @property
    def reasons(self) -> bool:
        """Whether it teaches the reasoning mode: its last reply has reasoning."""
        return bool(self.messages[-1].get("reasoning_content"))


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation and which of them carry loss."""

    ids: list[int]
    mask: list[bool]

    @property
    def loss_tokens(self) -> int:
        return sum(self.mask)


def dialogues(source: str, heldout_share: float) -> tuple[list[Example], list[Example]]:
    """Human small talk in five languages: (train, held out), split by a hash of the first turn.

    Args:
        source: a data card whose files are YAML lists of conversations in a folder per language.
    """
    sides: tuple[list[Example], list[Example]] = ([], [])
    for name, data in sorted(sources.files(sources.load_card(source)).items()):
        folder = name.split("/")[-2] if "/" in name else ""
        if not name.endswith(".yml") or folder not in _DIALOGUE_FOLDERS:
            continue
        for turns in yaml.load(data, Loader=yaml.CSafeLoader)["conversations"]:
            turns = [" ".join(str(t).split()) for t in turns[: len(turns) // 2 * 2]]
            if not all(turns) or not turns:
                continue
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
            heldout = hashlib.sha256(turns[0].encode()).digest()[0] < 256 * heldout_share
            sides[heldout].append(Example("dialogue", _DIALOGUE_FOLDERS[folder], messages))
    return sides


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[Example], max_tokens: int
) -> dict[bool, list[Encoded]]:
    """Encode what fits ``max_tokens``, by mode: ``{True: reasoning, False: non-reasoning}``."""
    encoded: dict[bool, list[Encoded]] = {True: [], False: []}
    for example in examples:
        item = Encoded(*encode_chat(tokenizer, example.messages, tools=example.tools))
        if len(item.ids) <= max_tokens:
            encoded[example.reasons].append(item)
    return encoded


def balance(encoded: Mapping[bool, Sequence[Encoded]], ratio: float, seed: int) -> list[Encoded]:
    """Both modes in a seeded order, the larger one cut until loss tokens stand ``ratio`` to 1.

    Raises:
        ValueError: a mode without conversations.
    """
    shuffled = {}
    for mode, items in encoded.items():
        if not items:
            raise ValueError(
                f"no {'reasoning' if mode else 'non-reasoning'} conversations to balance"
            )
        shuffled[mode] = random.Random(f"{seed} {mode}").sample(list(items), len(items))
    tokens = {mode: sum(e.loss_tokens for e in items) for mode, items in shuffled.items()}
    unit = min(tokens[True] / ratio, tokens[False])
    kept = _up_to(shuffled[True], unit * ratio) + _up_to(shuffled[False], unit)
    random.Random(seed).shuffle(kept)
    return kept


def _up_to(items: Sequence[Encoded], loss_tokens: float) -> list[Encoded]:
    kept, total = [], 0
    for item in items:
        if total + item.loss_tokens > loss_tokens:
            break
        kept.append(item)
        total += item.loss_tokens
    return kept


class PackedChats:
    """Batches of rows filled with whole conversations; a pure function of (seed, step).

    Conversations are laid into rows first-fit in the order given; epochs shuffle the rows.
    """

    def __init__(
        self, encoded: Sequence[Encoded], sequence_length: int, batch_size: int, pad: int, seed: int
    ):
        self.batch_size, self.seed = batch_size, seed
        rows: list[list[Encoded]] = []
        open_rows: list[tuple[list[Encoded], int]] = []
        for item in encoded:
            for i, (row, room) in enumerate(open_rows):
                if len(item.ids) <= room:
                    row.append(item)
                    open_rows[i] = (row, room - len(item.ids))
                    break
            else:
                row = [item]
                rows.append(row)
                open_rows = [*open_rows, (row, sequence_length - len(item.ids))][-8:]
        if len(rows) < batch_size:
            raise ValueError(f"{len(rows)} rows of chats do not fill a batch of {batch_size}")
        self.input_ids = torch.full((len(rows), sequence_length), pad)
        self.document_ids = torch.full_like(self.input_ids, -1)
        self.loss_mask = torch.zeros_like(self.input_ids, dtype=torch.bool)
        for r, row in enumerate(rows):
            start = 0
            for d, item in enumerate(row):
                span = slice(start, start + len(item.ids))
                self.input_ids[r, span] = torch.tensor(item.ids)
                self.document_ids[r, span] = d
                self.loss_mask[r, span] = torch.tensor(item.mask)
                start = span.stop

    def __len__(self) -> int:
        """Full batches in one epoch."""
        return len(self.input_ids) // self.batch_size

    def batch(self, step: int) -> dict[str, Tensor]:
        """``input_ids``, ``document_ids`` (-1: padding) and ``loss_mask``, each [B, T]."""
        epoch, within = divmod(step, len(self))
        order = random.Random(f"{self.seed} {epoch}").sample(
            range(len(self.input_ids)), len(self.input_ids)
        )
        rows = torch.tensor(order[within * self.batch_size : (within + 1) * self.batch_size])
        return {
            "input_ids": self.input_ids[rows],
            "document_ids": self.document_ids[rows],
            "loss_mask": self.loss_mask[rows],
        }


def chat_loss(model: KexaForCausalLM, batch: Mapping[str, Tensor], mtp_weight: float = 0.0) -> Loss:
    """The model's training loss with assistant tokens as the only targets.

    Without a weight the MTP block is left as it is, and not computed.
    """
    return model.loss(
        batch["input_ids"], batch["document_ids"], batch["loss_mask"], mtp_weight=mtp_weight
    )


@torch.no_grad()
def validation_loss(model: KexaForCausalLM, chats: PackedChats) -> float:
    """Mean cross-entropy of the assistant's tokens over an epoch of full batches, in nats."""
    model.eval()
    total = count = 0.0
    device = model.lm_head.weight.device
    for step in range(len(chats)):
        batch = {name: value.to(device) for name, value in chats.batch(step).items()}
        tokens = int(batch["loss_mask"].sum())
        total += float(chat_loss(model, batch).next_token) * tokens
        count += tokens
    return total / count
