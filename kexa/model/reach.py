"""Which token sees which, asked of the model itself rather than of its masks.

Feed T distinct tokens. Hidden state t depends on the token at s exactly when its gradient with
respect to that token's embedding is not zero, so one backward pass per query gives one row of the
reach matrix. Through one window layer a query reaches W keys; through L of them L (W - 1) + 1;
through a global layer everything before it in its document.

Legend: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kexa.model.transformer import KexaForCausalLM


def reach(model: KexaForCausalLM, tokens: int, document_ids_T: Tensor | None = None) -> Tensor:
    """Bool ``[tokens, tokens]``: does the hidden state in row t depend on the token in column s?

    Raises:
        ValueError: more tokens than the vocabulary has distinct ones.
    """
    if tokens > model.config.vocab_size:
        raise ValueError(
            f"tokens={tokens} must be distinct, but the vocabulary has {model.config.vocab_size}"
        )
    embedding = model.model.embed_tokens.weight
    ids_BT = torch.arange(tokens, device=embedding.device)[None]
    documents = None if document_ids_T is None else document_ids_T.to(embedding.device)[None]
    hidden_TD = model.hidden_states(ids_BT, documents)[0]
    rows = []
    for t in range(tokens):
        (gradient,) = torch.autograd.grad(hidden_TD[t].sum(), embedding, retain_graph=True)
        rows.append(gradient[:tokens].abs().sum(-1) > 0)
    return torch.stack(rows).cpu()
