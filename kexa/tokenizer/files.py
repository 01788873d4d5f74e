"""Tokenizers on disk, in the layout that ``tokenizers``, ``transformers`` and ``tiktoken`` load.

A loaded tokenizer reads the string ``<|user|>`` as the special token it spells: right for a
rendered chat, wrong for what a user typed. With ``tokenizer.encode_special_tokens = True``
(``split_special_tokens=True`` in ``transformers``) no special token comes out of foreign text;
``kexa.data.chat`` encodes the content of every message that way and adds control tokens by id.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from kexa.data.chat import CHAT_TEMPLATE
from kexa.record import write_atomic
from kexa.tokenizer.ranks import save_ranks
from kexa.tokenizer.vocabulary import BOS, END_OF_TURN, PAD, SPECIAL_TOKENS


def save(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``ranks.tiktoken``."""
    directory = Path(directory)
    save_ranks(tokenizer, directory)
    write_atomic(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [
            t for t in SPECIAL_TOKENS if t not in (BOS, END_OF_TURN, PAD)
        ],
        "chat_template": CHAT_TEMPLATE,
    }
    write_atomic(
        directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    )


def load(directory: str | Path) -> Tokenizer:
    """Read a saved tokenizer.

    Raises:
        ValueError: there is none in the directory.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no tokenizer.json in {directory}; run notebook 01_tokenizer first")
    return Tokenizer.from_file(str(path))
