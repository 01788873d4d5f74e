"""Ranks of a test: forked from a server that has imported everything once, joined by gloo."""

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from kexa import dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.dist.small_run"])


def run(work: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """``work(*arguments)`` on every rank; what each returned, in order of rank."""
    answers, found = CONTEXT.Queue(), {}
    with dist.meeting_place() as meeting:
        processes = [
            CONTEXT.Process(target=_rank, args=(answers, rank, ranks, meeting, work, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            for _ in processes:
                rank, fault, answer = answers.get(timeout=120)
                assert not fault, fault
                found[rank] = torch.load(io.BytesIO(answer), weights_only=False)
            for process in processes:
                process.join(60)
                assert process.exitcode is not None, "a rank has answered but does not end"
        finally:
            for process in processes:
                process.kill()
    return [found[rank] for rank in range(ranks)]


def _rank(answers, rank, ranks, meeting, work, arguments):
    os.environ |= meeting | {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    answer = io.BytesIO()  # tensors as bytes: as themselves they would outlive their process
    try:
        torch.save(work(*arguments), answer)
    except BaseException:
        answers.put((rank, traceback.format_exc(), b""))
    else:
        answers.put((rank, "", answer.getvalue()))
