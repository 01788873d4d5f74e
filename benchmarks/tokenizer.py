"""The tokenizer at size: training time and memory, encoding speed, round trips.

python -m benchmarks.tokenizer train --megabytes 64 256        seconds and peak memory, ratios
python -m benchmarks.tokenizer encode --megabytes 64           against the stock encoder, MB/s
python -m benchmarks.tokenizer round-trip --strings 1000000    decode(encode(x)) = NFC(x)
python -m benchmarks.tokenizer gains --vocab-sizes 8192 32768  over the baseline, by size

Text is the corpus of a profile. More of it than there is, for training, is made by remixing: real
lines in which every tenth word is another one of its category or a new one, so that phrases and
words go on to be new as text grows, words at the rate at which they do in real text. Every size is
trained in a process of its own, from files that are read as they are needed. ``encode`` and
``round-trip`` check first and exit with 1 on a difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from benchmarks.__main__ import RESULTS, device_name, results_of, spread
from kexa.config import TokenizerConfig, load
from kexa.data import load_corpus
from kexa.data.packing import literal
from kexa.record import commit, write_atomic
from kexa.tokenizer import (
    CorpusEncoder,
    encode_corpus,
    gain_interval,
    token_counts,
    train_baseline,
    train_tokenizer,
)
from kexa.tokenizer.splitter import nfc

ROUNDS = 5
_SAMPLE = 1_000_000  # characters of each category that the encoders are compared on
_REDRAWN = 0.1
_GROWTH = 0.6  # distinct words grow as text to this power (0.5 to 0.8 by category of the corpus)


class Lines:
    """Documents in a file, one JSON string a line: read afresh each time, never held."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[str]:
        with open(self.path, encoding="utf-8") as file:
            yield from map(json.loads, file)


def remixed(documents: list[str], size: int, seed: str) -> Iterator[str]:
    """Documents of ``size`` UTF-8 bytes in all: the given ones, then new ones made of them.

    A redrawn word is another one of the documents or, whenever the growth of real text says that a
    new one is due, the front of one word and the back of another.
    """
    rng, words = random.Random(seed), sorted({w for text in documents for w in text.split(" ")})
    read = given = sum(text.count(" ") + 1 for text in documents)
    made, first = 0, True

    def drawn() -> str:
        nonlocal made
        if made >= len(words) * ((read / given) ** _GROWTH - 1):
            return rng.choice(words)
        made += 1
        front, back = rng.choice(words), rng.choice(words)
        return front[: (len(front) + 1) // 2] + back[len(back) // 2 :]

    while True:
        for text in documents:
            if not first:
                old = text.split(" ")
                read += len(old)
                text = " ".join(w if rng.random() > _REDRAWN else drawn() for w in old)
            yield text
            size -= len(text.encode("utf-8"))
            if size <= 0:
                return
        first = False


def training(profile: str, megabytes: list[int], vocab_size: int) -> list[dict]:
    """Seconds and peak memory of ``train_tokenizer`` by size of text, a fresh process for each."""
    corpus, rows = load_corpus(load(profile).data).train, []
    for size in megabytes:
        with tempfile.TemporaryDirectory() as folder:
            for category, documents in corpus.items():
                each = size * 1_000_000 // len(corpus)
                texts = remixed([d.text for d in documents], each, category)
                with open(Path(folder) / category, "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(text) + "\n" for text in texts)
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                measured = pool.apply(_train, (folder, list(corpus), profile, vocab_size))
        grown = {
            f"{name} over {rows[0]['megabytes']} MB": round(measured[name] / rows[0][name], 2)
            for name in ("seconds", "cpu_seconds", "peak_gib")
            if rows
        }
        rows.append({"megabytes": size, "vocab_size": vocab_size, **measured, **grown})
        print(rows[-1])
    return rows


def encoding(tokenizer: Tokenizer, texts: Mapping[str, list[str]]) -> list[dict]:
    """MB/s of the corpus encoder and of the stock one in one process, interleaved.

    ``cold``: nothing seen before; ``warm``: the same text once more. ``stock`` is ``encode_batch``
    and ``stock fast`` is ``encode_batch_fast``, which leaves out offsets; both use all cores.

    Raises:
        ValueError: the encoder gives other ids than the stock one.
    """
    rows = []
    for name, documents in texts.items():
        seconds: dict[str, list[float]] = {}
        with literal(tokenizer):
            for _ in tqdm(range(ROUNDS), desc=name, leave=False):
                fast = CorpusEncoder(tokenizer)
                for kind in ("cold", "warm"):
                    ours = _timed(seconds, kind, fast.encode_batch, documents)
                for kind, run in _stock(tokenizer).items():
                    theirs = _timed(seconds, kind, run, documents)
        _require_equal(name, ours, theirs)
        rows.append({"text": name, **_speeds(documents, seconds, ("cold", "warm"))})
        print(rows[-1])
    return rows


def stream(tokenizer: Tokenizer, documents: Iterable[str], processes: int) -> list[dict]:
    """MB/s into token files: ``encode_corpus``, its processes started within the time, and a loop
    over each stock encoder of :func:`encoding` that writes the same bytes; interleaved.

    Raises:
        ValueError: the files differ.
    """
    documents, seconds = list(documents), {}
    with tempfile.TemporaryDirectory() as folder, literal(tokenizer):
        ours, theirs = Path(folder) / "kexa", Path(folder) / "stock"
        for _ in tqdm(range(ROUNDS), desc="stream", leave=False):
            _timed(seconds, "kexa", encode_corpus, tokenizer, documents, ours, processes)
            for kind, run in _stock(tokenizer).items():
                _timed(seconds, kind, _write, run, documents, theirs)
        if (ours / "tokens.bin").read_bytes() != theirs.read_bytes():
            raise ValueError("encode_corpus writes other ids than the stock encoder gives")
    row = {"text": "stream", "processes": processes, **_speeds(documents, seconds, ("kexa",))}
    print(row)
    return [row]


def unbroken(tokenizer: Tokenizer, texts: Mapping[str, str]) -> list[dict]:
    """MB/s of one long document over that of the same text in documents of 10 KB, interleaved."""
    rows = []
    for name, text in texts.items():
        seconds: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for kind, documents in {"whole": [text], "10 KB": _parts(text, 10_000)}.items():
                fast = CorpusEncoder(tokenizer)
                found = _timed(seconds, kind, fast.encode_batch, documents)
                assert sum(len(row) for row in found) > 0
        ratios = [b / a for a, b in zip(seconds["whole"], seconds["10 KB"], strict=True)]
        size = len(text.encode("utf-8")) / 1e6
        speeds = {n: round(size / statistics.median(s), 2) for n, s in seconds.items()}
        rows.append({"text": name, "megabytes": size, "MB/s": speeds, "ratio": spread(ratios)})
        print(rows[-1])
    return rows


def gains(
    config: TokenizerConfig,
    vocab_sizes: list[int],
    seen: Mapping[str, list[str]],
    held: Mapping[str, list[str]],
) -> list[dict]:
    """Gain in bytes per held-out token over the baseline of each size, % with 95% intervals."""
    groups = {**held, "multilingual": [t for c in ("es", "de", "ja", "vi") for t in held[c]]}
    rows = []
    for size in vocab_sizes:
        sized = replace(config, vocab_size=size)
        baseline = train_baseline(seen, sized)
        tokenizer = train_tokenizer(seen, sized, baseline)
        row = {"vocab_size": size, "baseline_size": baseline.get_vocab_size()}
        for name, texts in groups.items():
            before, after = (token_counts(each, texts) for each in (baseline, tokenizer))
            row[name] = [round(100 * x, 1) for x in gain_interval(before, after, seed=0)]
        rows.append(row)
        print(row)
    return rows


def strings(count: int, seed: int, documents: list[str]) -> Iterator[str]:
    """A third each: any scalar values; letters under several marks; cuts of documents."""
    rng = random.Random(seed)
    scalars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    marks = [c for c in scalars if unicodedata.combining(c)]
    for i in range(count):
        if i % 3 == 0:
            yield "".join(rng.choices(scalars, k=rng.randint(1, 24)))
        elif i % 3 == 1:
            yield "".join(rng.choice(scalars) + "".join(rng.choices(marks, k=3)) for _ in range(3))
        else:
            text = rng.choice(documents)
            start = rng.randrange(len(text) + 1)
            yield text[start : start + rng.randint(1, 80)]


def unlike(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts that do not come back: decoded, they should be their NFC.

    The library orders marks by the tables of Unicode 9. Python's tables are younger: with a mark
    that they know and the library does not, its NFC has another order, and the text that comes back
    is equal to it only after normalising both.
    """
    texts, found = list(texts), []
    with literal(tokenizer):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    decoded = tokenizer.decode_batch([e.ids for e in encodings], skip_special_tokens=False)
    for text, back in zip(texts, decoded, strict=True):
        wanted = unicodedata.normalize("NFC", text)
        same = back == wanted or (not YOUNG.isdisjoint(text) and back == nfc(text))
        if not same or unicodedata.normalize("NFC", back) != wanted:
            found.append(text)
    return found


def _young() -> frozenset[str]:
    """Characters that Python's NFC moves or composes and the library's leaves as they are."""
    found = {"\U00011935", "\U00011930"}  # the one pair composed since Unicode 9
    for c in (chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))):
        text = f"x{c}\u0334" if unicodedata.combining(c) > 1 else f"x\u0345{c}"
        if nfc(text) != unicodedata.normalize("NFC", text):
            found.add(c)
    return frozenset(found)


YOUNG = _young()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer")
    parser.add_argument("what", choices=("train", "encode", "round-trip", "gains"))
    parser.add_argument("--profile", default="laptop", help="whose corpus and vocabulary")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[64, 256], help="of text")
    parser.add_argument("--vocab-size", type=int, default=0, help="0: the profile's")
    parser.add_argument(
        "--vocab-sizes", type=int, nargs="+", default=[8192, 32_768, 65_536, 131_072]
    )
    parser.add_argument("--strings", type=int, default=1_000_000)
    arguments = parser.parse_args()
    config = load(arguments.profile)
    vocab_size = arguments.vocab_size or config.tokenizer.vocab_size
    if arguments.what == "train":
        rows = training(arguments.profile, arguments.megabytes, vocab_size)
    else:
        corpus = load_corpus(config.data)
        seen = {c: [d.text for d in ds] for c, ds in corpus.train.items()}
        held = {c: [d.text for d in ds] for c, ds in corpus.heldout.items()}
        sized = replace(config.tokenizer, vocab_size=vocab_size)
        if arguments.what == "gains":
            rows = gains(config.tokenizer, arguments.vocab_sizes, seen, held)
        elif arguments.what == "encode":
            tokenizer = train_tokenizer(seen, sized)
            size = arguments.megabytes[0] * 1_000_000 // len(seen)
            mixed = [t for c, texts in seen.items() for t in remixed(texts, size, c)]
            random.Random(0).shuffle(mixed)
            rows = stream(tokenizer, mixed, processes=os.cpu_count())
            words = {"4 MB of words": " ", "4 MB of letters": ""}
            rows += unbroken(tokenizer, {n: _long(seen["en"], s) for n, s in words.items()})
            rows += encoding(tokenizer, {c: _first(texts, _SAMPLE) for c, texts in seen.items()})
        else:
            tokenizer = train_tokenizer(seen, sized)
            documents = [text for texts in held.values() for text in texts]
            rows = [_round_trip(tokenizer, arguments.strings, documents)]
    found = {"device": device_name("cpu"), "commit": commit(), "rows": rows}
    folder = results_of(found["device"])
    if arguments.what == "gains":  # tokens are counted: no device changes them
        found, folder = {"profile": config.profile, "commit": commit(), "rows": rows}, RESULTS
    name = f"tokenizer-{arguments.what}.json"
    write_atomic(folder / name, json.dumps(found, indent=1) + "\n")
    return 1 if any(row.get("changed") for row in rows) else 0


def _round_trip(tokenizer: Tokenizer, count: int, documents: list[str]) -> dict:
    changed, drawn, batch = 0, strings(count, 0, documents), 10_000
    for _ in tqdm(range(0, count, batch), desc="round trips"):
        changed += len(unlike(tokenizer, [t for _, t in zip(range(batch), drawn, strict=False)]))
    print(f"{count:,} strings, {changed} did not come back")
    return {"strings": count, "changed": changed}


def _train(folder: str, categories: list[str], profile: str, vocab_size: int) -> dict:
    config = replace(load(profile).tokenizer, vocab_size=vocab_size)
    start = time.perf_counter()
    train_tokenizer({c: Lines(Path(folder) / c) for c in categories}, config)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "cores": os.cpu_count(),
    }


def _timed(seconds: dict[str, list[float]], name: str, run: Callable, *arguments: Any) -> Any:
    start = time.perf_counter()
    found = run(*arguments)
    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return found


def _stock(tokenizer: Tokenizer) -> dict[str, Callable[[list[str]], list]]:
    return {
        "stock": lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False),
        "stock fast": lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
    }


def _speeds(documents: list[str], seconds: dict[str, list[float]], ours: tuple[str, ...]) -> dict:
    """Megabytes, MB/s by candidate, and how many times as fast each of ours is as each other."""
    megabytes = sum(len(text.encode("utf-8")) for text in documents) / 1e6
    ratios = {
        f"{our} / {rival}": spread([b / a for a, b in zip(seconds[our], taken, strict=True)])
        for our in ours
        for rival, taken in seconds.items()
        if rival not in ours
    }
    speeds = {n: round(megabytes / statistics.median(s), 2) for n, s in seconds.items()}
    return {"megabytes": round(megabytes, 1), "MB/s": speeds, "ratio": ratios}


def _require_equal(name: str, ours: list[np.ndarray], theirs: list) -> None:
    if [row.tolist() for row in ours] != [encoding.ids for encoding in theirs]:
        raise ValueError(f"{name}: the corpus encoder gives other ids than the stock one")


def _write(run: Callable[[list[str]], list], documents: list[str], path: Path) -> None:
    """The documents' ids, each opened by [BOS], a batch of 64 documents at a time."""
    with open(path, "wb") as file:
        for i in range(0, len(documents), 64):
            for found in run(documents[i : i + 64]):
                file.write(np.array([1, *found.ids], np.int32).tobytes())


def _parts(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def _first(documents: list[str], size: int) -> list[str]:
    """The first documents, ``size`` characters or a little more of them."""
    before = itertools.accumulate(map(len, documents), initial=0)
    return [text for text, start in zip(documents, before, strict=False) if start < size]


def _long(documents: list[str], between: str) -> str:
    """4 million characters: words of the documents with ``between`` between them."""
    words = re.findall(r"[^\W\d_]+", " ".join(documents))
    return between.join(itertools.islice(itertools.cycle(words), 1_400_000))[:4_000_000]


if __name__ == "__main__":
    sys.exit(main())
