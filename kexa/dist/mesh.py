"""Processes and how they share the work: a mesh of ``fsdp x ep`` ranks, one process per device.

    torchrun --nproc-per-node 4 -m kexa.train --profile P --fsdp 2 --ep 2

    rank = f * ep + e      f: place along "fsdp", e: place along "ep"

Every rank reads rows of its own of each batch. Along "ep" the ranks hold different experts and
exchange tokens (:mod:`kexa.dist.experts`); along "fsdp" they hold slices of the same experts. All
other parameters are sliced over all ranks, since each of them needs them whole only while a layer
runs (:mod:`kexa.dist.shard`). chosen: "ep" is the inner axis, so that its exchanges, the most
frequent ones, stay inside a machine.

One process is the mesh 1 x 1, without a process group. Processes meet by the environment that
torchrun sets, or :func:`meeting_place`; CPUs talk by gloo, GPUs by NCCL.

reported: nothing about parallelism but that the router is dropless.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kexa.config import ConfigError


class CannotMeet(ConnectionError):
    """Where the ranks should meet cannot be reached, or is taken."""


@dataclass(frozen=True)
class Layout:
    """The mesh, and this process's place in it."""

    fsdp: int = 1
    ep: int = 1
    rank: int = 0
    grid: DeviceMesh | None = None  # axes "fsdp" and "ep"; None for one process
    world: DeviceMesh | None = None  # all ranks on one axis

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.fsdp * self.ep

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a batch that all ranks share.

        Raises:
            ConfigError: the ranks do not divide the rows.
        """
        if batch_size % self.size:
            raise ConfigError(
                f"{batch_size} rows do not divide among fsdp {self.fsdp} x ep {self.ep} = "
                f"{self.size} ranks: change pretrain.batch_size, pretrain.accumulate or the mesh"
            )
        each = batch_size // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


ALONE = Layout()


def check(fsdp: int, ep: int, processes: int, num_experts: int) -> None:
    """Refuse a mesh that does not fit.

    Raises:
        ConfigError: an axis below 1, axes that do not multiply to the number of processes, or that
            do not divide the experts.
    """
    if fsdp < 1 or ep < 1 or fsdp * ep != processes:
        raise ConfigError(
            f"fsdp {fsdp} x ep {ep} is a mesh of {fsdp * ep} ranks but {processes} processes run: "
            "let --fsdp times --ep be the number of processes that torchrun starts"
        )
    if not divides(fsdp, ep, num_experts):
        raise ConfigError(
            f"fsdp {fsdp} x ep {ep} does not divide {num_experts} experts: with --ep above 1 every "
            "rank holds as many whole experts"
        )


def divides(fsdp: int, ep: int, num_experts: int) -> bool:
    """Whether every rank gets as many whole experts, which "ep" above 1 asks for."""
    return ep == 1 or num_experts % (fsdp * ep) == 0


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device: torch.device) -> torch.device:
    """The device of this process among those of its machine."""
    if device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextlib.contextmanager
def meeting_place() -> Iterator[dict[str, str]]:
    """The environment by which :func:`join` finds a store of this process, open while inside.

    For ranks on this machine. The port is listened on before it is told, so nobody else takes it.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 opens no store of its own
    }


def join(fsdp: int, ep: int, device: torch.device) -> Layout:
    """Meet the other processes; call :func:`check` before and :func:`leave` at the end.

    Raises:
        CannotMeet: the meeting place cannot be reached, or is taken.
    """
    if fsdp * ep == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except torch.distributed.DistNetworkError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise CannotMeet(
            f"the ranks cannot meet at {place}: is the port free, the machine up? ({error})"
        ) from error
    grid = init_device_mesh(device.type, (fsdp, ep), mesh_dim_names=("fsdp", "ep"))
    world = init_device_mesh(device.type, (fsdp * ep,), mesh_dim_names=("world",))
    return Layout(fsdp, ep, torch.distributed.get_rank(), grid, world)


def leave() -> None:
    """End the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
