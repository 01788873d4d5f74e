"""Calls are checked against their schema, and whatever is wrong comes back in words."""

import pytest

from kexa.agents.tools import Refused, Result, Tool, Toolbox


def paint(colour, coats=1, dry=True):
    if colour == "black":
        raise Refused("out of black")
    return f"{coats} x {colour}"


TOOL = Tool(
    "paint",
    "Paint the wall.",
    {
        "colour": {"type": "string", "enum": ["red", "black"]},
        "coats": {"type": "integer"},
        "dry": {"type": "boolean"},
    },
    paint,
    optional=("coats", "dry"),
)
BOX = Toolbox([TOOL])
RED = {"colour": "red"}


def test_a_fitting_call_is_made():
    assert BOX.call("paint", {"colour": "red", "coats": 2}) == Result("2 x red", True)
    assert BOX.call("paint", {"colour": "red"}) == Result("1 x red", True)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("print", {}, "error: no tool 'print'; use one of paint"),
        ("paint", {}, "error: paint needs the argument 'colour'"),
        ("paint", {"colour": "blue"}, "error: 'colour' must be one of red, black, not 'blue'"),
        ("paint", {"colour": 3}, "error: 'colour' must be of type string, not 3"),
        ("paint", RED | {"coats": True}, "error: 'coats' must be of type integer, not True"),
        ("paint", RED | {"coats": 1.5}, "error: 'coats' must be of type integer, not 1.5"),
        ("paint", RED | {"dry": 1}, "error: 'dry' must be of type boolean, not 1"),
        ("paint", {"wet": 1}, "error: paint has no argument 'wet'; arguments: colour, coats, dry"),
        ("paint", {"colour": "black"}, "error: out of black"),
    ],
)  # fmt: skip
def test_a_call_that_does_not_fit_is_an_error_in_words(name, arguments, message):
    assert BOX.call(name, arguments) == Result(message, False)


def test_declarations_follow_the_protocol():
    [declaration] = BOX.declarations
    assert declaration["name"] == "paint"
    assert declaration["parameters"]["required"] == ["colour"]
    assert declaration["parameters"]["properties"]["coats"] == {"type": "integer"}


def test_names_must_differ():
    with pytest.raises(ValueError, match="two tools share a name: paint, paint"):
        Toolbox([TOOL, TOOL])
