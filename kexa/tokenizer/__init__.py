"""Byte-level BPE baseline, two-stage SuperBPE tokenizer, metrics, and files that stock libraries load."""

from kexa.tokenizer.files import load, save
from kexa.tokenizer.metrics import bytes_per_token, overlap, superword_share, superwords
from kexa.tokenizer.superbpe import train_baseline, train_tokenizer
from kexa.tokenizer.vocabulary import SPECIAL_TOKENS, budget

__all__ = [
    "SPECIAL_TOKENS",
    "budget",
    "bytes_per_token",
    "load",
    "overlap",
    "save",
    "superword_share",
    "superwords",
    "train_baseline",
    "train_tokenizer",
]
