"""BPE baseline, two-stage SuperBPE tokenizer, metrics, and files that stock libraries load."""

from kexa.tokenizer.files import load, save
from kexa.tokenizer.metrics import (
    bytes_per_token,
    gain_interval,
    overlap,
    split,
    superwords,
    token_counts,
    utf8_bytes,
)
from kexa.tokenizer.superbpe import train_baseline, train_tokenizer
from kexa.tokenizer.vocabulary import SPECIAL_TOKENS, budget

__all__ = [
    "SPECIAL_TOKENS",
    "budget",
    "bytes_per_token",
    "gain_interval",
    "load",
    "overlap",
    "save",
    "split",
    "superwords",
    "token_counts",
    "train_baseline",
    "train_tokenizer",
    "utf8_bytes",
]
