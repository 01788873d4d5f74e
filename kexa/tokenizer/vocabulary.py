"""What the vocabulary is made of: special tokens, split patterns, and how many ids each part gets.

A split pattern cuts text into pre-tokens; no token ever crosses a cut. Two patterns differ in one
place only:

* ``WORDS`` (stage 1) ends a pre-token after each word: subwords are learned inside words.
* ``PHRASES`` (stage 2 and the exported tokenizer) lets words joined by single spaces stay together,
  so a token may span several words. Line breaks, digits (always alone) and punctuation still cut.

reported: the pattern was revised for superword boundaries, line breaks and multilingual Unicode.
inferred: its alternatives, from the public ports of the tokenizer; written here without nested
repetition. inferred: the baseline's pattern, GPT-2's with digits cut one at a time, as the public
ports of EXAONE 3 and 4 use.

Ids: 0-127 special tokens, 128-383 the bytes, then the kept baseline tokens, the new subwords and,
last, the superwords. Ids rise with merge rank, so each part is one range of ids.

reported: ids 0, 1, 50-55, 66-68, 73, 74. chosen: the ids of the other named tokens, whose names
alone are published, and a block of 128 that keeps room for more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from kexa.config import TokenizerConfig

NAMED_TOKENS: dict[int, str] = {
    0: "[PAD]",
    1: "[BOS]",
    50: "<|system|>",
    51: "<|user|>",
    52: "<|assistant|>",
    53: "<|endofturn|>",
    54: "<think>",
    55: "</think>",
    56: "<|tool|>",
    57: "<|tool_declare|>",
    58: "<tool>",
    59: "</tool>",
    60: "<tool_call>",
    61: "</tool_call>",
    62: "<tool_result>",
    63: "</tool_result>",
    66: "<|vision_pad|>",
    67: "<|image_pad|>",
    68: "<|video_pad|>",
    69: "<|fim_prefix|>",
    70: "<|fim_middle|>",
    71: "<|fim_suffix|>",
    73: "<vision>",
    74: "</vision>",
    75: "PI:EMAIL",
    76: "PI:PHONE_NUM",
}
SPECIAL_TOKENS: tuple[str, ...] = tuple(
    NAMED_TOKENS.get(i, f"<|reserved_{i}|>") for i in range(128)
)
# inferred: they stand in training text, where cleaning writes them (kexa.data.personal). So they
# are the only special tokens that a text may spell: every encoder reads them, none reads the others
# from a corpus, and decoding never leaves them out.
PLACEHOLDERS = (NAMED_TOKENS[75], NAMED_TOKENS[76])
PAD, BOS, END_OF_TURN = SPECIAL_TOKENS[0], SPECIAL_TOKENS[1], SPECIAL_TOKENS[53]
NUM_BYTES = 256

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"\p{L}[\p{L}\p{M}]*"
_PATTERN = (
    CONTRACTIONS + r"|[^\r\n\p{{L}}\p{{N}}]?{core}"
    r"|\p{{N}}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
    r"|\s*[\r\n]"
    r"|\s+(?!\S)"
    r"|\s+"
)
WORDS = _PATTERN.format(core=_WORD)
PHRASES = _PATTERN.format(core=f"{_WORD}(?: {_WORD})*")
BASELINE_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CATEGORIES = ("en", "ko", "es", "de", "ja", "vi", "code", "stem")
BASELINE_CATEGORIES = ("en", "ko", "es")  # reported: the languages of EXAONE 4.0
# reported: new subwords are for new languages, STEM and code. chosen: the groups of the report's
# figure 3 share them equally, as do the languages in one, so that none drowns the others.
NEW_GROUPS = {"multilingual": ("es", "de", "ja", "vi"), "stem": ("stem",), "code": ("code",)}
SUPERWORD_GROUPS = {"en": ("en",), "ko": ("ko",), "multilingual": ("es", "de", "ja", "vi")}


@dataclass(frozen=True)
class Budget:
    """Number of ids of each part, in id order; they add up to the vocabulary size."""

    special: int
    bytes: int
    kept: int  # merged tokens taken over from the baseline
    new: dict[str, int]  # subwords learned, by category
    superwords: dict[str, int]  # tokens of several words, by group

    def ranges(self) -> dict[str, range]:
        """The ids of each part by name: ``kept``, ``new de``, ``superwords ko`` and so on."""
        sizes = {"special": self.special, "bytes": self.bytes, "kept": self.kept}
        sizes |= {f"new {category}": n for category, n in self.new.items()}
        sizes |= {f"superwords {group}": n for group, n in self.superwords.items()}
        ranges, start = {}, 0
        for name, size in sizes.items():
            ranges[name] = range(start, start + size)
            start += size
        return ranges


def baseline_size(config: TokenizerConfig) -> int:
    """Size of the baseline vocabulary, special tokens and bytes included."""
    return round(config.vocab_size * config.baseline_ratio)


def budget(config: TokenizerConfig, categories: Collection[str] = CATEGORIES) -> Budget:
    """Divide ``config.vocab_size`` for text in ``categories``.

    ``kept_share`` is a share of the baseline's merged tokens (chosen: special tokens and bytes
    always stay). ``superword_share`` is a share of the whole vocabulary. Parts are rounded so that
    they add up, the largest remainders up. Groups without text leave their ids to the others.

    Raises:
        ValueError: the shares leave no room for some part, or no group of superwords has text.
    """
    fixed = len(SPECIAL_TOKENS) + NUM_BYTES
    kept = round((baseline_size(config) - fixed) * config.kept_share)
    superwords = round(config.vocab_size * config.superword_share)
    new = config.vocab_size - fixed - kept - superwords
    if min(kept, new, superwords) < 1:
        raise ValueError(
            f"vocab_size={config.vocab_size} leaves {kept} ids for kept tokens, {new} for new "
            f"subwords and {superwords} for superwords beside {fixed} special tokens and bytes; "
            f"each needs at least 1: raise vocab_size or change the shares"
        )
    if (
        set(config.superword_split) != set(SUPERWORD_GROUPS)
        or min(config.superword_split.values()) <= 0
    ):
        raise ValueError(
            f"superword_split={config.superword_split} needs a positive share for each of "
            f"{', '.join(SUPERWORD_GROUPS)} and nothing else"
        )
    groups = _with_text(SUPERWORD_GROUPS, categories)
    if not groups:
        raise ValueError(f"superwords need text in a language, not only {', '.join(categories)}")
    fresh = _with_text(NEW_GROUPS, categories) or {c: (c,) for c in categories}
    equal = {c: 1 / len(members) for members in fresh.values() for c in members}
    return Budget(
        special=len(SPECIAL_TOKENS),
        bytes=NUM_BYTES,
        kept=kept,
        new=apportion(new, equal),
        superwords=apportion(superwords, {g: config.superword_split[g] for g in groups}),
    )


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Divide ``total`` by ``shares`` into whole numbers that add up; largest remainders go up.

    Example: ``apportion(10, {"a": 1, "b": 2})`` is ``{"a": 3, "b": 7}``.
    """
    exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    parts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def _with_text(
    groups: Mapping[str, tuple[str, ...]], categories: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """The groups, each with those of its members that have text; empty groups are left out."""
    present = {g: tuple(c for c in members if c in categories) for g, members in groups.items()}
    return {g: members for g, members in present.items() if members}
