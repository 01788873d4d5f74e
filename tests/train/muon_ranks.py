"""What the ranks of ``test_sharded_muon`` run: ``python muon_ranks.py RANK RANKS FOLDER``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kexa.train import Muon, newton_schulz

STEPS = 3


class Toy(nn.Module):
    """Matrices of several sizes, one with fewer rows than some ranks expect, and two stacks."""

    def __init__(self):
        super().__init__()
        shapes = {"q": (12, 8), "k": (5, 8), "v": (1, 8), "o": (8, 12), "fused": (16, 8)}
        stacks = {"gate_up": (4, 12, 8), "down": (3, 8, 6)}
        generator = torch.Generator().manual_seed(0)
        for name, shape in (shapes | stacks).items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in self.parameters())


def groups(model):
    two = [model.fused, model.gate_up]
    return [
        {"params": [p for p in model.parameters() if all(p is not t for t in two)]},
        {"params": two, "parts": 2},
    ]


def trained(model, nesterov):
    """The model after some steps, and how many elements this rank orthogonalised."""
    elements = 0
    original = newton_schulz.orthogonalize

    def counted(x):
        nonlocal elements
        elements += x.numel()
        return original(x)

    newton_schulz.orthogonalize = counted
    optimizer = Muon(groups(model), lr=0.1, nesterov=nesterov)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(step).backward()
        optimizer.step()
    newton_schulz.orthogonalize = original
    return optimizer, elements


def main(rank, ranks, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    mesh = init_device_mesh("cpu", (ranks,))
    saved = {}
    for nesterov in (True, False):
        model = fully_shard(Toy(), mesh=mesh)
        optimizer, elements = trained(model, nesterov)
        state = {f"p.{name}": p.full_tensor() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            state[f"m.{name}"] = optimizer.state[p]["momentum"].full_tensor()
        saved[nesterov] = {"state": state, "elements": elements}
    torch.save(saved, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
