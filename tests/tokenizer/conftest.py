"""A small corpus in eight categories, made by rule, and both tokenizers trained on it once."""

import random

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from kexa.config import TokenizerConfig
from kexa.tokenizer import train_baseline, train_tokenizer

WORDS = {
    "en": "the of and to in is that for it as was with be by on not he his but at are this have",
    "ko": "수 있습니다 그리고 하는 것이 대한 있는 우리는 한국어 모델을 학습 한다 위해",
    "es": "de la que el en y los se del las un por con no una su para es al lo como más pero",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch",
    "ja": "これは 日本語の 文章です。 学習する モデルと 言語を 使って、 データから 作られた 東京",
    "vi": "của và các là trong được cho không có một người những với để đã này khi từ về nhiều",
    "code": "def return self.value = None if not isinstance( ): for item in range( import __init__",
    "stem": "let $x_i$ be a matrix with \\frac{1}{2} then the integral over n converges to zero as",
}


def documents(category: str, count: int = 60, made: int = 40) -> list[str]:
    """Lines of words with a skewed frequency, some capitals, digits and punctuation."""
    rng = random.Random(category)
    words = WORDS[category].split()
    vocabulary = words + [rng.choice(words) + rng.choice(words) for _ in range(made)]
    weights = [1 / (i + 1) for i in range(len(vocabulary))]
    join = "" if category == "ja" else " "
    texts = []
    for _ in range(count):
        lines = []
        for _ in range(8):
            picked = rng.choices(vocabulary, weights, k=12)
            lines.append(join.join(picked).capitalize() + rng.choice([".", ": yes", ", 1997", "!"]))
        texts.append("\n".join(lines))
    return texts


def whole(vocab: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """The library reading each text as one pre-token, changing and adding nothing."""
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


CONFIG = TokenizerConfig(
    vocab_size=1000,
    baseline_ratio=0.6667,
    kept_share=0.7,
    superword_share=0.2,
    superword_split={"en": 2.0, "ko": 3.0, "multilingual": 1.0},
    max_superword_words=4,
)


@pytest.fixture(scope="session")
def config():
    return CONFIG


@pytest.fixture(scope="session")
def corpora():
    return {category: documents(category) for category in WORDS}


@pytest.fixture(scope="session")
def baseline(corpora, config):
    return train_baseline(corpora, config)


@pytest.fixture(scope="session")
def tokenizer(corpora, config, baseline):
    return train_tokenizer(corpora, config, baseline)
