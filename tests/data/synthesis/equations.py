"""A check that several tests share."""

import re


def assert_equations_hold(text):
    """Every "a = b" of numbers in a text is true; returns how many were checked.

    A line that opens with "=" goes on with the expression of the line before.
    """
    checked, before = 0, None
    for line in text.split("\n"):
        sides = [side.replace("×", "*").replace("°", "") for side in line.split(" = ")]
        if line.startswith("= "):
            sides = [before, line.removeprefix("= ").replace("×", "*")]
        sides[0] = sides[0].rpartition(": ")[2]
        values = [eval(s) for s in sides if re.fullmatch(r"[-+*/() \d]+", s) and s.strip()]
        assert len(set(values)) <= 1, text
        checked += len(values) > 1
        before = sides[-1]
    return checked
