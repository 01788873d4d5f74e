"""Keys and values of past tokens, for decoding.

A window layer only ever reads its last ``window`` keys, so it keeps a ring of ``window + chunk``
slots: position p lives in slot ``p mod (window + chunk)``. The extra ``chunk`` slots let one call
write up to ``chunk`` tokens and let up to ``chunk`` of them be taken back (rejected drafts) without
losing a key that is still inside some window. A global layer keeps every position, in buffers that
double when full.

Rows of a batch advance separately: ``length_B`` is the number of columns a row has filled and
``start_B`` how many of the first ones are left padding. What a slot holds follows from those two
numbers, so taking tokens back only lowers ``length_B``; stale slots fall outside every mask. While
all rows are of one length, new tokens go to the same slots in each and are stored as one slice.

A call on an empty cache may bring any number of tokens. Later calls bring at most ``chunk``.

Legend: B rows, T new tokens, S slots, G key-value heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kexa.kernels.decode.reference import visible_slots

if TYPE_CHECKING:
    from kexa.model.step import LayerStep


@dataclass
class Step:
    """One forward call: where its T tokens go in the buffers and what they may see."""

    positions_BT: Tensor
    window_slots_BT: Tensor
    column: int | None  # where the tokens begin, if that is one place for all rows
    window_mask: Tensor | None = None  # [B, 1, T, S], 0 or -inf, to be added to scores;
    global_mask: Tensor | None = None  # None on an empty cache: only the call's own tokens count
    start_B: Tensor | None = None  # columns of left padding, where there is a mask


class LayerCache:
    """The buffers of one layer; ``window`` is None for a global layer."""

    def __init__(self, window: int | None, chunk: int):
        self.slots = None if window is None else window + chunk
        self.key_BGSK: Tensor | None = None
        self.value_BGSK: Tensor | None = None
        self.takes_step: bool | None = None  # see kexa.model.step, which sets both
        self.layer_step: LayerStep | None = None

    def update(
        self, key_BGTK: Tensor, value_BGTK: Tensor, step: Step
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store new keys and values; return all keys and values to look at, and their mask."""
        slots_BT = step.positions_BT if self.slots is None else step.window_slots_BT
        if self.slots is not None:  # of a long prompt only the tail stays
            slots_BT = slots_BT[:, -self.slots :]
            key_BGTK, value_BGTK = key_BGTK[:, :, -self.slots :], value_BGTK[:, :, -self.slots :]
        mask = step.global_mask if self.slots is None else step.window_mask
        seen = self.slots or (mask.shape[-1] if mask is not None else slots_BT.shape[1])
        self._reserve(key_BGTK, seen)
        run = self._run(step, key_BGTK.shape[2])
        if run is not None:
            self.key_BGSK[:, :, run] = key_BGTK
            self.value_BGSK[:, :, run] = value_BGTK
        else:
            rows_B1 = torch.arange(len(slots_BT), device=slots_BT.device)[:, None]
            self.key_BGSK[rows_B1, :, slots_BT] = key_BGTK.transpose(1, 2)
            self.value_BGSK[rows_B1, :, slots_BT] = value_BGTK.transpose(1, 2)
        return self.key_BGSK[:, :, :seen], self.value_BGSK[:, :, :seen], mask

    def _run(self, step: Step, stored: int) -> slice | None:
        """The slots of the step's last ``stored`` tokens, if they are one run for all rows."""
        if step.column is None:
            return None
        first = step.column + step.positions_BT.shape[1] - stored
        if self.slots is not None:
            first %= self.slots
            if first + stored > self.slots:
                return None
        return slice(first, first + stored)

    def _reserve(self, like_BGTK: Tensor, slots: int) -> None:
        have = 0 if self.key_BGSK is None else self.key_BGSK.shape[2]
        if have >= slots:
            return
        batch, heads, _, size = like_BGTK.shape
        capacity = self.slots or max(slots, 2 * have, 64)
        for name in ("key_BGSK", "value_BGSK"):
            grown = like_BGTK.new_zeros(batch, heads, capacity, size)
            if have:
                grown[:, :, :have] = getattr(self, name)
            setattr(self, name, grown)


class Cache:
    """All layers' buffers and the rows' lengths.

    Args:
        layer_types: ``"sliding_attention"`` or ``"full_attention"`` per layer. window: keys a
        window layer sees, the query's own included. batch_size: number of rows. chunk: most tokens
        per call once the cache is not empty, and most tokens a roll-back removes. device: where
        lengths (and, with the first call, buffers) live.
    """

    def __init__(
        self,
        layer_types: Sequence[str],
        window: int,
        batch_size: int,
        chunk: int = 8,
        device: torch.device | str = "cpu",
    ):
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1")
        self.window, self.chunk = window, chunk
        self.layers = [
            LayerCache(window if kind == "sliding_attention" else None, chunk)
            for kind in layer_types
        ]
        self.length_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.start_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = 0  # upper bound of length_B that needs no device read
        self.level = True  # whether all rows are known to be that long

    def begin(self, batch_size: int, new_tokens: int, padding_B: Tensor | None) -> Step:
        """Advance every row by ``new_tokens`` and work out slots and masks once for all layers.

        Raises:
            ValueError: other batch size than the cache's; more than ``chunk`` tokens on a cache in
            use.
        """
        if batch_size != len(self.length_B):
            raise ValueError(f"batch of {batch_size} rows on a cache made for {len(self.length_B)}")
        empty = self.longest == 0
        if not empty and new_tokens > self.chunk:
            raise ValueError(
                f"{new_tokens} new tokens in one call; this cache, once in use, takes {self.chunk} "
                "(its chunk)"
            )
        if not empty and padding_B is not None:
            raise ValueError(
                "document_ids go with the first call on a cache only (they mark left padding)"
            )
        device = self.length_B.device
        positions_BT = self.length_B[:, None] + torch.arange(new_tokens, device=device)
        ring = self.window + self.chunk
        column = self.longest if self.level else None
        step = Step(positions_BT, positions_BT % ring, column)
        if empty:
            if padding_B is not None:
                self.start_B = padding_B
        else:
            step.start_B = self.start_B
            if any(layer.slots is not None for layer in self.layers):
                step.window_mask = self._mask(positions_BT, ring, self.window)
            if any(layer.slots is None for layer in self.layers):
                step.global_mask = self._mask(positions_BT, self.longest + new_tokens, None)
        self.length_B = self.length_B + new_tokens
        self.longest += new_tokens
        return step

    def _mask(self, positions_BT: Tensor, slots: int, window: int | None) -> Tensor:
        seen = visible_slots(positions_BT, self.start_B, slots, window)
        zeros = self.layers[0].key_BGSK.new_zeros(seen.shape)
        return zeros.masked_fill_(~seen, float("-inf"))

    def roll_back(self, tokens: int | Tensor) -> None:
        """Forget the last ``tokens`` columns: one number for all rows, or one per row [B].

        Raises:
            ValueError: more than ``chunk`` or fewer than zero tokens, or more than a row holds.
        """
        tokens_B = torch.as_tensor(tokens, device=self.length_B.device).expand_as(self.length_B)
        most, least = int(tokens_B.max()), int(tokens_B.min())
        if least < 0 or most > self.chunk or bool((tokens_B > self.length_B).any()):
            raise ValueError(
                f"cannot take back {most if least >= 0 else least} tokens: at most {self.chunk} "
                "(the chunk) and no more than a row holds"
            )
        self.length_B = self.length_B - tokens_B
        self._measure()

    def set_chunk(self, chunk: int) -> None:
        """Go on with another ``chunk``: rings shrink or grow to it, what a window sees is kept."""
        old, new = self.window + self.chunk, self.window + chunk
        self.chunk = chunk
        back = torch.arange(min(old, new), 0, -1, device=self.length_B.device)
        positions_BS = self.length_B[:, None] - back  # negative ones fall on slots nobody sees
        rows_B1 = torch.arange(len(self.length_B), device=back.device)[:, None]
        for layer in self.layers:
            if layer.slots is None:
                continue
            layer.slots = new
            for name in ("key_BGSK", "value_BGSK"):
                held = getattr(layer, name)
                if held is not None:
                    ring = held.new_zeros(*held.shape[:2], new, held.shape[3])
                    ring[rows_B1, :, positions_BS % new] = held[rows_B1, :, positions_BS % old]
                    setattr(layer, name, ring)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows [R] (int64): finished ones left out, a prompt's row repeated."""
        self.length_B, self.start_B = self.length_B[rows], self.start_B[rows]
        self._measure()
        for layer in self.layers:
            if layer.key_BGSK is not None:
                layer.key_BGSK, layer.value_BGSK = layer.key_BGSK[rows], layer.value_BGSK[rows]

    def _measure(self) -> None:
        lengths = self.length_B.tolist()
        self.longest = max(lengths, default=0)
        self.level = min(lengths, default=0) == self.longest

    def numel(self) -> int:
        """Numbers held in all buffers (keys and values)."""
        return sum(
            2 * layer.key_BGSK.numel() for layer in self.layers if layer.key_BGSK is not None
        )
