"""Meshes that do not fit are refused in a sentence with the numbers."""

import socket

import pytest
import torch

from kexa import dist
from kexa.config import ConfigError
from kexa.train.__main__ import main


@pytest.mark.parametrize(
    "mesh, message",
    [
        ((2, 2, 3, 8), "fsdp 2 x ep 2 is a mesh of 4 ranks but 3 processes run"),
        ((0, 1, 1, 8), "fsdp 0 x ep 1"),
        ((1, 3, 3, 8), "fsdp 1 x ep 3 does not divide 8 experts"),
        ((3, 4, 12, 8), "fsdp 3 x ep 4 does not divide 8 experts"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(ConfigError, match=message):
        dist.check(*mesh)


def test_rows_are_split_evenly_or_refused():
    ranks = [dist.Layout(2, 2, rank).rows(8) for rank in range(4)]
    assert [list(range(8))[rows] for rows in ranks] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ConfigError, match="6 rows do not divide among fsdp 2 x ep 2 = 4 ranks"):
        dist.Layout(2, 2).rows(6)


def test_a_meeting_place_that_is_taken_is_told(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in (address | {"RANK": "0", "WORLD_SIZE": "2"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(dist.CannotMeet, match=r"cannot meet at 127\.0\.0\.1:\d+: is the port"):
            dist.join(2, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ep", "2"], "fsdp 0 x ep 2 is a mesh of 0 ranks but 1 processes run"),
        (["--fsdp", "2"], "fsdp 2 x ep 1 is a mesh of 2 ranks but 1 processes run"),
        (["--set", "pretrain.batch_size"], "write it as KEY=VALUE"),
        (["--set", "pretrain.batch=3"], "unknown config key 'pretrain.batch'"),
    ],
)
def test_the_command_refuses_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
