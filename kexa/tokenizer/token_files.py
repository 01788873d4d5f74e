"""A corpus as token files that are read without loading them.

``tokens.bin``: int32 in the machine's byte order, the documents end to end, each opened by
``[BOS]`` as :mod:`kexa.data.packing` wants them. ``offsets.npy``: int64 [documents + 1], written
last, so that a directory that has it is complete.

Memory follows the longest document, which is encoded whole: one line of 100 MB takes 1.9 GB where
it has words, and 3.6 GB where it is one word.
"""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import pickle
import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kexa.data.packing import TokenizedDocuments
from kexa.record import write_atomic, writing
from kexa.tokenizer.corpus_encoder import CorpusEncoder
from kexa.tokenizer.encoding_process import EncodingProcess
from kexa.tokenizer.splitter import require_text
from kexa.tokenizer.vocabulary import BOS

_CHARACTERS_PER_BATCH = 1 << 20
_AHEAD = 8  # batches a process that wait for the one before them
_TOKENS, _OFFSETS = "tokens.bin", "offsets.npy"


def encode_corpus(
    tokenizer: Tokenizer, documents: Iterable[str], directory: str | Path, processes: int = 1
) -> TokenizedDocuments:
    """Encode documents into ``directory`` and open what was written.

    Args:
        documents: texts in order; read once, a few batches at a time.
        processes: how many encode at a time, this one among them. The files do not depend on it.

    Raises:
        ValueError: no documents, no ``[BOS]`` token, a document that is not valid Unicode, or
            ``processes`` below 1.
        RuntimeError: another process was ended from outside.
    """
    if processes < 1:
        raise ValueError(f"processes={processes} must be 1 or more")
    bos = tokenizer.token_to_id(BOS)
    if bos is None:
        raise ValueError(f"the tokenizer has no {BOS} token; use one made by kexa.tokenizer")
    directory, lengths = Path(directory), []
    with writing(directory / _TOKENS):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _OFFSETS).unlink(missing_ok=True)
        with open(directory / _TOKENS, "wb") as file:
            for ids, ends in _encoded(tokenizer, _batches(documents), processes):
                sizes = np.diff(ends, prepend=0)
                np.insert(ids, ends - sizes, bos).tofile(file)
                lengths.append(sizes + 1)
    if not lengths:
        raise ValueError("no documents to encode; give at least one text")
    offsets = io.BytesIO()
    np.save(offsets, np.cumsum(np.concatenate([[0], *lengths])))
    write_atomic(directory / _OFFSETS, offsets.getvalue())
    return open_corpus(directory)


def open_corpus(directory: str | Path) -> TokenizedDocuments:
    """Map the token files of :func:`encode_corpus` into memory, read-only.

    Raises:
        ValueError: the files are missing, or do not fit each other.
    """
    directory = Path(directory)
    if not (directory / _OFFSETS).is_file():
        raise ValueError(f"no finished token files in {directory}; run encode_corpus again")
    offsets = np.load(directory / _OFFSETS, mmap_mode="r")
    expected, found = int(offsets[-1]) * 4, (directory / _TOKENS).stat().st_size
    if expected != found:
        raise ValueError(
            f"{_TOKENS} in {directory} has {found} bytes where {_OFFSETS} counts {expected}; "
            "run encode_corpus again"
        )
    return TokenizedDocuments(np.memmap(directory / _TOKENS, np.int32, mode="r"), offsets)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for i, document in enumerate(documents):
        require_text(document, f"document {i}")
        batch.append(document)
        size += len(document)
        if size >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(
    tokenizer: Tokenizer, batches: Iterator[list[str]], processes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids of every batch, and where its documents end in them; in order.

    This process encodes whatever the others have no room for. They start while it encodes the
    first batch, and begin with what it learned from that.
    """
    encoder = CorpusEncoder(tokenizer)
    first = list(itertools.islice(batches, 2))
    if processes == 1 or len(first) < 2:
        yield from map(encoder.encode, itertools.chain(first, batches))
        return
    with ThreadPoolExecutor(processes - 1) as pool, contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[EncodingProcess] = queue.SimpleQueue()
        others = [stack.enter_context(EncodingProcess()) for _ in range(processes - 1)]
        yield encoder.encode(first[0])
        learned = pickle.dumps(encoder, pickle.HIGHEST_PROTOCOL)
        for other in others:
            other.begin(learned)
            idle.put(other)
        found: collections.deque[tuple[list[str], Future]] = collections.deque()
        for texts in itertools.chain(first[1:], batches):
            room = sum(not future.done() for _, future in found) < 2 * len(others)
            future = pool.submit(_encode, idle, texts) if room else _done(encoder.encode(texts))
            found.append((texts, future))
            while found and (len(found) > _AHEAD * processes or found[0][1].done()):
                yield found.popleft()[1].result()
        rest = [_done(encoder.encode(texts)) if f.cancel() else f for texts, f in found]
        yield from (future.result() for future in rest)


def _encode(
    idle: queue.SimpleQueue[EncodingProcess], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """A thread's work: have an idle process encode."""
    process = idle.get()
    try:
        return process.encode(texts)
    finally:
        idle.put(process)


def _done(result: tuple[np.ndarray, np.ndarray]) -> Future:
    future = Future()
    future.set_result(result)
    return future
