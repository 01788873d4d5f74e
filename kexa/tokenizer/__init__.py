"""BPE baseline, SuperBPE tokenizer, metrics, corpus encoder, and files stock libraries load."""

from kexa.tokenizer.corpus_encoder import CorpusEncoder
from kexa.tokenizer.files import load, save
from kexa.tokenizer.metrics import (
    bytes_per_token,
    gain_interval,
    longest_superwords,
    overlap,
    renyi_efficiency,
    split,
    superword_usage,
    superwords,
    token_counts,
    usage,
    utf8_bytes,
)
from kexa.tokenizer.superbpe import train_baseline, train_tokenizer
from kexa.tokenizer.token_files import encode_corpus, open_corpus
from kexa.tokenizer.vocabulary import PHRASES, SPECIAL_TOKENS, WORDS, budget

__all__ = [
    "PHRASES",
    "SPECIAL_TOKENS",
    "WORDS",
    "CorpusEncoder",
    "budget",
    "bytes_per_token",
    "encode_corpus",
    "gain_interval",
    "load",
    "longest_superwords",
    "open_corpus",
    "overlap",
    "renyi_efficiency",
    "save",
    "split",
    "superword_usage",
    "superwords",
    "token_counts",
    "train_baseline",
    "train_tokenizer",
    "usage",
    "utf8_bytes",
]
