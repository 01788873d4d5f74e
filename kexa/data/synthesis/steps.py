"""Worked solutions: from a reasoning-gym entry to steps that are right, in no language yet.

One function per family takes the ``metadata`` of an entry and returns a :class:`Problem`: values
for the question, steps, answer. A step is ``(name, values)``: a phrase of ``problems.toml`` with
its values; the step ``equation`` is the same in all languages. Everything is computed from the
numbers again and compared with the entry's answer, so a fault of the generator becomes a rejected
entry, named by a string instead of a :class:`Problem`:

- ``simple_equations`` can give ``0 = 0``, whose answer is any number;
- ``simple_geometry`` can ask for a last angle of 180 degrees or more in a convex polygon;
- ``basic_arithmetic`` rounds down where a division by an expression does not come out even;
- ``leg_counting`` gives starfish legs and counts people as animals.

chosen: the families, those whose metadata holds all numbers and whose steps are school arithmetic.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Step = tuple[str, dict[str, Any]]
LEGS = {
    animal.replace("_", " "): legs
    for legs, animals in {
        0: "snake sea_slug jellyfish flatworm leech",
        2: "chicken bird duck",
        4: "dog cat cow horse lion elephant giraffe tiger deer sheep",
        6: "ant butterfly beetle bee wasp grasshopper cricket cockroach praying_mantis firefly",
        8: "spider scorpion",
        10: "crab lobster shrimp",
        14: "woodlouse",
    }.items()
    for animal in animals.split()
}
NOT_EVEN = "division does not come out even"
ANOTHER_ANSWER = "the steps lead to another answer"
_OPERATORS = {
    ast.Add: ("+", 1, operator.add),
    ast.Sub: ("-", 1, operator.sub),
    ast.Mult: ("×", 2, operator.mul),
    ast.Div: ("/", 2, operator.floordiv),
}


@dataclass(frozen=True)
class Problem:
    """``values`` fill the question of ``family``, each step's values its phrase."""

    family: str
    values: dict[str, Any]
    steps: list[Step]
    answer: str


def solve(family: str, entry: Mapping[str, Any]) -> Problem | str:
    """The worked problem of a reasoning-gym entry, or why it is left out.

    ``solve("gcd", {"answer": "3", "metadata": {"numbers": [69, 21]}})`` has the steps
    ``69 = 3 × 21 + 6``, ``21 = 3 × 6 + 3``, ``6 = 2 × 3 + 0`` and "the remainder is 0".
    """
    problem = SOLVERS[family](entry["metadata"])
    if isinstance(problem, str):
        return problem
    answer = entry["answer"]
    if family == "fraction_simplification":  # 233/380 or LaTeX in one of four styles
        answer = "/".join(re.findall(r"\d+", answer))
    return problem if answer == problem.answer else ANOTHER_ANSWER


def equation(text: str) -> Step:
    """A step that needs no words."""
    return "equation", {"text": text}


def calculation(metadata: Mapping[str, Any]) -> Problem | str:
    """An expression, one operation carried out per step, innermost and leftmost first."""
    tree = _number(ast.parse(metadata["expression"], mode="eval").body)
    first, lines = show(tree), []
    while not isinstance(tree, int):
        tree = _reduced(tree)
        if tree is None:
            return NOT_EVEN
        lines.append(equation(f"= {show(tree)}"))
    return Problem("calculation", {"expression": first}, lines, str(tree))


Tree = int | ast.expr  # whole numbers stand for themselves


def _number(node: ast.expr) -> Tree:
    """The tree with every literal, signs included, as a whole number."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        inside = _number(node.operand)
        literal = isinstance(inside, int) and isinstance(node.operand, ast.Constant)
        return -inside if literal else ast.UnaryOp(node.op, inside)
    return ast.BinOp(_number(node.left), node.op, _number(node.right))


def _reduced(tree: Tree) -> Tree | None:
    """The tree after one operation; None where a division leaves a remainder."""
    if isinstance(tree, ast.UnaryOp):
        if isinstance(tree.operand, int):
            return -tree.operand
        inside = _reduced(tree.operand)
        return inside if inside is None else ast.UnaryOp(tree.op, inside)
    left, right = tree.left, tree.right
    if not isinstance(left, int):
        left = _reduced(left)
    elif not isinstance(right, int):
        right = _reduced(right)
    else:
        if isinstance(tree.op, ast.Div) and (right == 0 or left % right):
            return None
        return _OPERATORS[type(tree.op)][2](left, right)
    return None if left is None or right is None else ast.BinOp(left, tree.op, right)


def show(tree: Tree, first: bool = True) -> str:
    """An expression as it is written: no needless parentheses, none around a leading sign."""
    if isinstance(tree, int):
        return f"({tree})" if tree < 0 and not first else str(tree)
    if isinstance(tree, ast.UnaryOp):
        inside = tree.operand
        bare = isinstance(inside, int) and inside >= 0
        text = f"-{show(inside)}" if bare else f"-({show(inside)})"
        return text if first else f"({text})"
    sign, rank, _ = _OPERATORS[type(tree.op)]
    left, right = tree.left, tree.right
    inner = isinstance(left, ast.BinOp) and _OPERATORS[type(left.op)][1] < rank
    before = f"({show(left)})" if inner else show(left, first)
    inner = isinstance(right, ast.BinOp) and _OPERATORS[type(right.op)][1] <= rank
    after = f"({show(right)})" if inner else show(right, False)
    return f"{before} {sign} {after}"


def product(metadata: Mapping[str, Any]) -> Problem | str:
    """Two factors, the second taken apart by its digits."""
    a, b = map(int, metadata["expression"].split(" * "))
    digits = str(b)
    parts = [int(d) * 10 ** (len(digits) - i) for i, d in enumerate(digits, 1) if d != "0"]
    steps = []
    if len(parts) > 1:
        steps = [
            equation("= " + " + ".join(f"{a} × {part}" for part in parts)),
            equation("= " + " + ".join(str(a * part) for part in parts)),
        ]
    steps.append(equation(f"= {a * b}"))
    return Problem("calculation", {"expression": f"{a} × {b}"}, steps, str(a * b))


def _euclid(a: int, b: int) -> tuple[list[Step], int]:
    """Euclid's algorithm as steps ``a = q × b + r``, and the greatest common divisor."""
    a, b, steps = max(a, b), min(a, b), []
    while True:
        quotient, rest = divmod(a, b)
        steps.append(equation(f"{a} = {quotient} × {b} + {rest}"))
        if not rest:
            return [*steps, ("divisor", {"divisor": b})], b
        a, b = b, rest


def greatest_divisor(metadata: Mapping[str, Any]) -> Problem | str:
    a, b = metadata["numbers"]
    steps, divisor = _euclid(a, b)
    return Problem("gcd", {"a": a, "b": b}, steps, str(divisor))


def least_multiple(metadata: Mapping[str, Any]) -> Problem | str:
    a, b = metadata["numbers"]
    steps, divisor = _euclid(a, b)
    multiple = a * b // divisor
    steps += [("multiple", {}), equation(f"{a} × {b} / {divisor} = {multiple}")]
    return Problem("lcm", {"a": a, "b": b}, steps, str(multiple))


def factorization(metadata: Mapping[str, Any]) -> Problem | str:
    number = rest = metadata["number"]
    factors, steps = [], []
    for candidate in range(2, math.isqrt(number) + 1):
        while rest % candidate == 0 and rest > candidate:
            steps.append(equation(f"{rest} / {candidate} = {rest // candidate}"))
            factors.append(candidate)
            rest //= candidate
    factors.append(rest)
    steps.append(("prime", {"number": rest}))
    return Problem("prime_factorization", {"number": number}, steps, " × ".join(map(str, factors)))


def fraction(metadata: Mapping[str, Any]) -> Problem | str:
    above, below = metadata["numerator"], metadata["denominator"]
    steps, divisor = _euclid(above, below)
    a, b = above // divisor, below // divisor
    steps += [equation(f"{above} / {divisor} = {a}"), equation(f"{below} / {divisor} = {b}")]
    return Problem("fraction_simplification", {"fraction": f"{above}/{below}"}, steps, f"{a}/{b}")


def linear_equation(metadata: Mapping[str, Any]) -> Problem | str:
    """``k × x + c = d``: the constant to the right, then the factor, then a check."""
    name, text = metadata["variable"], metadata["equation"]
    left, _, right = text.partition(" = ")
    at = [_value(ast.parse(left, mode="eval").body, x) for x in (0, 1)]
    constant, factor, total = at[0], at[1] - at[0], int(right)
    if not factor:
        return "any number solves it"
    if (total - constant) % factor:
        return NOT_EVEN
    moved, answer = total - constant, (total - constant) // factor
    steps: list[Step] = []
    if constant:
        sign = "-" if constant > 0 else "+"
        steps.append(equation(f"{factor} × {name} = {total} {sign} {abs(constant)} = {moved}"))
    steps.append(equation(f"{name} = {moved} / {show(factor, False)} = {answer}"))
    plus = f" {'+' if constant > 0 else '-'} {abs(constant)}" if constant else ""
    steps.append(("check", {"equation": f"{factor} × {show(answer, False)}{plus} = {total}"}))
    values = {"variable": name, "equation": text.replace("*", " × ")}
    return Problem("simple_equations", values, steps, str(answer))


def _value(node: ast.expr, x: int) -> int:
    if isinstance(node, ast.Name):
        return x
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return -_value(node.operand, x)
    return _OPERATORS[type(node.op)][2](_value(node.left, x), _value(node.right, x))


def polygon_angle(metadata: Mapping[str, Any]) -> Problem | str:
    sides, angles = metadata["n_sides"], [int(angle) for angle in metadata["known_angles"]]
    total, known = (sides - 2) * 180, sum(angles)
    answer = total - known
    if not 0 < answer < 180:
        return "no such convex polygon"
    listed = ", ".join(f"{angle}°" for angle in angles)
    steps = [
        ("angle_sum", {"equation": f"({sides} - 2) × 180° = {total}°"}),
        equation(" + ".join(f"{angle}°" for angle in angles) + f" = {known}°"),
        equation(f"{total}° - {known}° = {answer}°"),
    ]
    values = {"sides": sides, "count": len(angles), "angles": listed}
    return Problem("simple_geometry", values, steps, str(answer))


def leg_count(metadata: Mapping[str, Any]) -> Problem | str:
    animals = metadata["animals"]
    if not animals.keys() <= LEGS.keys():
        return "an animal whose legs are in doubt"
    totals = {animal: count * LEGS[animal] for animal, count in animals.items()}
    steps: list[Step] = [
        ("legs", {"animal": a, "equation": f"{animals[a]} × {LEGS[a]} = {totals[a]}"})
        for a in animals
    ]
    answer = sum(totals.values())
    if len(totals) > 1:
        steps.append(equation(f"{' + '.join(map(str, totals.values()))} = {answer}"))
    return Problem("leg_counting", {"animals": animals}, steps, str(answer))


SOLVERS: dict[str, Callable[[Mapping[str, Any]], Problem | str]] = {
    "basic_arithmetic": calculation,
    "chain_sum": calculation,
    "products": product,
    "gcd": greatest_divisor,
    "lcm": least_multiple,
    "prime_factorization": factorization,
    "fraction_simplification": fraction,
    "simple_equations": linear_equation,
    "simple_geometry": polygon_angle,
    "leg_counting": leg_count,
}
