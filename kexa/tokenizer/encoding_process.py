"""Another process that encodes: a program of its own, which reads batches and writes their ids.

``multiprocessing`` would import the caller's script over there, and with it perhaps torch, which
takes longer than encoding some megabytes. This process imports what encoding needs. Over its
standard input come an encoder, with all that it has learned so far, and then one batch after the
other; their ids leave by its standard output. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys

import numpy as np

from kexa.tokenizer.corpus_encoder import CorpusEncoder


class EncodingProcess:
    """Starts now, and encodes one batch at a time until the end of the ``with`` block."""

    def __init__(self):
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        environment["TOKENIZERS_PARALLELISM"] = "false"  # it shares the machine with others
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

        self._unsent = b""

    def begin(self, encoder: bytes) -> None:
        """A pickled :class:`CorpusEncoder` for it, before the first batch, with which it is sent:
        the process may not be there yet."""
        self._unsent = encoder

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`CorpusEncoder.encode` gives for the texts.

        Raises:
            RuntimeError: the process has ended, as it does when memory runs out.
        """
        message = self._unsent + pickle.dumps(texts, pickle.HIGHEST_PROTOCOL)
        self._unsent = b""
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError):
            raise RuntimeError(
                f"an encoding process ended with code {self._process.wait()} (-9: killed, as when "
                "memory runs out); run encode_corpus again, with fewer processes if memory is short"
            ) from None

    def __enter__(self) -> EncodingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError), self._process:
            self._process.kill()  # it has nothing to finish


def serve() -> None:
    """What the process runs."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write among the answers
    encoder: CorpusEncoder = pickle.load(requests)
    while requests.peek(1):
        pickle.dump(encoder.encode(pickle.load(requests)), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()
