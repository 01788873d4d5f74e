"""BPE baseline, two-stage SuperBPE tokenizer, metrics, and files that stock libraries load."""

from kexa.tokenizer.files import load, save
from kexa.tokenizer.metrics import (
    bytes_per_token,
    gain_interval,
    overlap,
    split,
    superwords,
    token_counts,
    usage,
    utf8_bytes,
)
from kexa.tokenizer.superbpe import train_baseline, train_tokenizer
from kexa.tokenizer.vocabulary import PHRASES, SPECIAL_TOKENS, WORDS, budget

__all__ = [
    "PHRASES",
    "SPECIAL_TOKENS",
    "WORDS",
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
    "usage",
    "utf8_bytes",
]
