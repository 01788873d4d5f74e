"""The decoder: pre-norm blocks of hybrid attention and (mostly sparse) feed-forward, untied head,
MTP.

    x += Attention(RMSNorm(x));  x += FFN(RMSNorm(x));  logits = lm_head(RMSNorm(x))     (reported)

The first ``first_k_dense_replace`` layers have a dense SwiGLU, all others a mixture of experts.
What training minimises is

    total = next_token + mtp_weight * mtp + balance_weight * balance

with mean cross-entropies in nats over the counted targets and ``balance`` summed over the sparse
layers. A z-loss, not reported and off, adds z_loss * (z + mtp_weight * z_mtp), z the mean squared
log-normaliser of the logits. Documents packed into one row never see each other and nothing is
predicted across a boundary; a negative document id marks padding. Initial values (inferred from
``initializer_range``): every matrix, router and embedding normal with that deviation, norms one,
correction bias zero.

Behind a prompt in a cache, where nothing is learnt, a CPU takes the layers' short form: see
``step``.

Legend: B rows, T tokens, D hidden size, V vocabulary, L sparse layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kexa.config import ModelConfig
from kexa.model.attention import Attention, Context, rope_table
from kexa.model.cache import Cache, LayerCache
from kexa.model.linear import Head, RMSNorm, SwiGLU
from kexa.model.moe import SparseMoE
from kexa.model.mtp import MTPBlock
from kexa.model.recompute import Recomputed
from kexa.model.step import takes_step


class Loss(NamedTuple):
    """Scalars of one batch: ``total`` is minimised, the others are its unweighted parts."""

    total: Tensor
    next_token: Tensor
    mtp: Tensor
    balance: Tensor


def counted_targets(
    input_ids_BT: Tensor,
    document_ids_BT: Tensor | None,
    loss_mask_BT: Tensor | None,
    ahead: int,
) -> Tensor:
    """Which tokens count as targets ``ahead`` steps on: bool [B, T - ahead], at t of t + ahead.

    All steps from t to t + ahead must stay inside one document; arguments as in
    :meth:`KexaForCausalLM.loss`.
    """
    targets_BT = input_ids_BT[:, ahead:]
    length = targets_BT.shape[1]
    counted_BT = torch.ones_like(targets_BT, dtype=torch.bool)
    if loss_mask_BT is not None:
        counted_BT = loss_mask_BT[:, ahead:].bool()
    if document_ids_BT is not None:
        # A document is one run of equal ids.
        same_BT = (document_ids_BT[:, 1:] == document_ids_BT[:, :-1]) & (
            document_ids_BT[:, 1:] >= 0
        )
        for i in range(ahead):
            counted_BT = counted_BT & same_BT[:, i : i + length]
    return counted_BT


class DecoderLayer(Recomputed):
    """Layer ``index`` of the main model."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.layer_types[index])
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_sparse = index >= config.first_k_dense_replace
        self.mlp = (
            SparseMoE(config)
            if self.is_sparse
            else SwiGLU(config.hidden_size, config.intermediate_size)
        )

    def block(self, x_BTD: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        if takes_step(self, context, cache):
            return cache.layer_step(x_BTD, context, cache)
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context, cache)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if self.is_sparse:
            return x_BTD + self.mlp(normed_BTD, context.real_BT, context.balance)
        return x_BTD + self.mlp(normed_BTD)


class Embedding(nn.Embedding):
    """A look-up table; on the meta device nothing is drawn."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # drawing there makes torch import 150 MB of tracing
            super().reset_parameters()  # replaced by the table of initial values


class Decoder(nn.Module):
    """Everything named ``model.*`` in a checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class KexaForCausalLM(nn.Module):
    """K-EXAONE as a language model; parameter names are those of the published checkpoint.

    Experts are the exception: they are stacked per layer (see :class:`kexa.model.moe.Experts`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.mtp = MTPBlock(config) if config.num_nextn_predict_layers else None
        initialise(self)

    @property
    def moe_layers(self) -> list[SparseMoE]:
        """The sparse layers, first to last."""
        return [layer.mlp for layer in self.model.layers if layer.is_sparse]

    def forward(
        self,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits [B, T, V] in the model's dtype.

        Args:
            input_ids_BT: token ids, int64.
            document_ids_BT: int64; equal ids along a row are one document, negative ids padding.
                With a cache, only on its first call and only to mark left padding.
            cache: from :meth:`new_cache`; the call continues what the cache holds.

        Raises:
            ValueError: wrong shape, token id outside the vocabulary, more than
                ``max_position_embeddings`` tokens.
        """
        return self.lm_head(self.hidden_states(input_ids_BT, document_ids_BT, cache))

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head reads: hidden states [B, T, D] after the final norm."""
        self._check(input_ids_BT, document_ids_BT, cache)
        return self.decode(input_ids_BT, document_ids_BT, cache)

    def decode(
        self,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        balance: list[Tensor] | None = None,
    ) -> Tensor:
        """:meth:`hidden_states` without checking the arguments: one step of a decoding loop.

        A list given as ``balance`` receives the balance loss of every sparse layer.
        """
        x_BTD = F.embedding(input_ids_BT, self.model.embed_tokens.weight)
        collect = None if balance is None else balance.append
        context = self._context(self.model.layers, x_BTD, document_ids_BT, cache, collect)
        caches = [None] * len(self.model.layers) if cache is None else cache.layers
        for layer, layer_cache in zip(self.model.layers, caches, strict=True):
            x_BTD = layer(x_BTD, context, layer_cache)
        return self.model.norm(x_BTD)

    def mtp_hidden_states(
        self,
        next_ids_BT: Tensor,
        hidden_BTD: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The MTP block's normed output [B, T, D]; ``lm_head`` of it predicts the token at t + 2.

        At t it reads ``hidden_BTD[:, t]`` and the token at t + 1, which is ``next_ids_BT[:, t]``.
        """
        context = self._context(self.mtp.layers, hidden_BTD, document_ids_BT, cache)
        embedding_BTD = F.embedding(next_ids_BT, self.model.embed_tokens.weight)
        layer_cache = None if cache is None else cache.layers[0]
        return self.mtp(embedding_BTD, hidden_BTD, context, layer_cache)

    def loss(
        self,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        loss_mask_BT: Tensor | None = None,
        mtp_weight: float = 0.05,
        balance_weight: float = 1e-4,
        z_loss: float = 0.0,
        counts: tuple[int, int] | None = None,
    ) -> Loss:
        """Training loss of a batch, in nats per counted target.

        Args:
            input_ids_BT: token ids, int64.
            document_ids_BT: see :meth:`forward`.
            loss_mask_BT: bool; a token counts as a *target* only where it is true.
            mtp_weight: reported 0.05. At 0, or without an MTP block, ``mtp`` is not computed
                and zero.
            balance_weight: reported 1e-4.
            z_loss: weight of the squared log-normaliser of the logits, of the MTP block's too. It
                is part of ``total``; the value of ``next_token`` and ``mtp`` stays cross-entropy.
            counts: what to divide the summed losses of ``next_token`` and ``mtp`` by, if not by the
                numbers of targets counted here: those of a larger batch that this is a part of.

        Raises:
            ValueError: as :meth:`forward`.
        """
        self._check(input_ids_BT, document_ids_BT, None)
        balances: list[Tensor] = []
        next_count, mtp_count = counts or (None, None)
        hidden_BTD = self.decode(input_ids_BT, document_ids_BT, balance=balances)
        next_token, penalty = self._cross_entropy(
            hidden_BTD, input_ids_BT, document_ids_BT, loss_mask_BT, 1, z_loss, next_count
        )
        mtp = mtp_penalty = next_token.new_zeros(())
        balance = sum(balances, start=mtp)
        if self.mtp is not None and mtp_weight and input_ids_BT.shape[1] > 1:
            documents = None if document_ids_BT is None else document_ids_BT[:, :-1]
            ahead_BTD = self.mtp_hidden_states(input_ids_BT[:, 1:], hidden_BTD[:, :-1], documents)
            mtp, mtp_penalty = self._cross_entropy(
                ahead_BTD, input_ids_BT, document_ids_BT, loss_mask_BT, 2, z_loss, mtp_count
            )
        total = next_token + mtp_weight * mtp + balance_weight * balance
        return Loss(total, next_token - penalty, mtp - mtp_penalty, balance)

    def expert_load(self) -> Tensor:
        """Tokens per expert [L, E] counted in training forwards since the last bias update."""
        return torch.stack([layer.load_E for layer in self.moe_layers])

    @torch.no_grad()
    def update_balance_bias(self, step: float = 1e-4) -> None:
        """``b += step * sign(mean load - load)`` in every sparse layer, then clear the counts."""
        for layer in self.moe_layers:
            layer.update_bias(step)

    def new_cache(self, batch_size: int, chunk: int = 8) -> Cache:
        """An empty cache for the main model."""
        device = self.lm_head.weight.device
        return Cache(self.config.layer_types, self.config.sliding_window, batch_size, chunk, device)

    def new_mtp_cache(self, batch_size: int, chunk: int = 8) -> Cache:
        """An empty cache for the MTP block."""
        device = self.lm_head.weight.device
        return Cache(("full_attention",), self.config.sliding_window, batch_size, chunk, device)

    def _context(
        self,
        layers: nn.ModuleList,
        x_BTD: Tensor,
        document_ids_BT: Tensor | None,
        cache: Cache | None,
        balance: Callable[[Tensor], None] | None = None,
    ) -> Context:
        if cache is None:
            step, positions = None, torch.arange(x_BTD.shape[1], device=x_BTD.device)
        else:
            padding_B = None if document_ids_BT is None else (document_ids_BT < 0).sum(1)
            step = cache.begin(*x_BTD.shape[:2], padding_B)
            positions = step.positions_BT[:, None]
        cos = sin = turn = None
        if any(layer.self_attn.use_rope for layer in layers):
            head_dim, theta = self.config.head_dim, self.config.rope_theta
            cos, sin = rope_table(positions, head_dim, theta, x_BTD.dtype)
            turn = torch.cat((-sin[..., : head_dim // 2], sin[..., head_dim // 2 :]), dim=-1)
        return Context(cos, sin, turn, document_ids_BT, step, balance)

    def _cross_entropy(
        self,
        hidden_BTD: Tensor,
        input_ids_BT: Tensor,
        document_ids_BT: Tensor | None,
        loss_mask_BT: Tensor | None,
        ahead: int,
        z_loss: float,
        count: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Mean of -log p(token at t + ahead | hidden state at t) within t's document.

        The z-loss is part of it, and comes once more on its own, without gradient.
        """
        targets_BT = input_ids_BT[:, ahead:]
        length = targets_BT.shape[1]
        counted_BT = counted_targets(input_ids_BT, document_ids_BT, loss_mask_BT, ahead)
        # The head is the widest product of a small model: it runs on the counted positions only.
        targets_N, hidden_ND = targets_BT[counted_BT], hidden_BTD[:, :length][counted_BT]
        penalties: list[Tensor] = []
        loss = self.lm_head.loss(hidden_ND, targets_N, z_loss, penalties)
        count = max(1, len(targets_N) if count is None else count)
        return loss / count, penalties[0] / count

    def _check(
        self, input_ids_BT: Tensor, document_ids_BT: Tensor | None, cache: Cache | None
    ) -> None:
        config = self.config
        if input_ids_BT.dim() != 2 or input_ids_BT.numel() == 0:
            raise ValueError(
                f"input_ids must be [batch >= 1, tokens >= 1], got shape {list(input_ids_BT.shape)}"
            )
        if document_ids_BT is not None and document_ids_BT.shape != input_ids_BT.shape:
            raise ValueError(
                f"document_ids has shape {list(document_ids_BT.shape)}, input_ids "
                f"{list(input_ids_BT.shape)}"
            )
        length = input_ids_BT.shape[1] + (cache.longest if cache else 0)
        if length > config.max_position_embeddings:
            raise ValueError(
                f"sequence of {length} tokens exceeds max_position_embeddings="
                f"{config.max_position_embeddings}"
            )
        if not input_ids_BT.is_meta:
            low, high = (int(x) for x in input_ids_BT.aminmax())
            if low < 0 or high >= config.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary "
                    f"0..{config.vocab_size - 1}"
                )


@torch.no_grad()
def initialise(model: KexaForCausalLM) -> None:
    """Set every parameter from the table in the module header, by the global generator."""
    deviation = model.config.initializer_range
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif not parameter.is_meta:
            parameter.normal_(0.0, deviation)
