"""A corpus as token files that are read without loading them.

``tokens.bin``: int32 in the machine's byte order, the documents end to end, each opened by
``[BOS]`` as :mod:`kexa.data.packing` wants them. ``offsets.npy``: int64 [documents + 1], written
last, so that a directory that has it is complete.
"""

from __future__ import annotations

import collections
import io
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from kexa.data.packing import TokenizedDocuments
from kexa.record import write_atomic, writing
from kexa.tokenizer.corpus_encoder import CorpusEncoder
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
        processes: how many encode at a time. With 1 this process does, and the library's threads
            share what is not remembered. More are started afresh, so that a script that asks for
            them needs ``if __name__ == "__main__":``. The files do not depend on it.

    Raises:
        ValueError: no documents, no ``[BOS]`` token, a document that is not valid Unicode, or
            ``processes`` below 1.
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

    This process encodes whatever the others have no room for, from the first batch on: while they
    start, it already works.
    """
    encoder = CorpusEncoder(tokenizer)
    if processes == 1:
        yield from map(encoder.encode, batches)
        return
    context, found = multiprocessing.get_context("spawn"), collections.deque()
    with ProcessPoolExecutor(processes - 1, context, _start, (tokenizer.to_str(),)) as pool:
        for batch in batches:
            room = sum(not _done(each) for each in found) < 2 * (processes - 1)
            found.append(pool.submit(_encode, batch) if room else encoder.encode(batch))
            while found and (len(found) > _AHEAD * processes or _done(found[0])):
                yield _result(found.popleft())
        yield from map(_result, found)


def _start(tokenizer: str) -> None:
    """Make the encoder of a new process; it shares the machine with others, so uses one thread."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = CorpusEncoder(Tokenizer.from_str(tokenizer))


def _encode(batch: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return _encoder.encode(batch)


def _done(found: Future | tuple[np.ndarray, np.ndarray]) -> bool:
    return not isinstance(found, Future) or found.done()


def _result(found: Future | tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return found.result() if isinstance(found, Future) else found
