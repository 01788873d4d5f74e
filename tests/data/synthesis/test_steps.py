"""Worked solutions are right, and entries that cannot be worked are refused by name."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.data.synthesis import steps
from kexa.data.synthesis.steps import Problem, solve


def entry(answer, **metadata):
    return {"answer": str(answer), "metadata": metadata}


def texts(problem):
    return [values.get("text", name) for name, values in problem.steps]


@st.composite
def expressions(draw, depth=3):
    """Expressions in the spelling of reasoning-gym: signs, blanks, parentheses."""
    if not depth or draw(st.booleans()):
        return str(draw(st.integers(-99, 99)))
    left, right = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    text = f"{left} {draw(st.sampled_from('+-*'))} {right}"
    return draw(st.sampled_from(("{}", "( {} )", "-( {} )"))).format(text)


@given(expressions())
def test_every_line_of_a_calculation_has_the_value_of_the_expression(expression):
    problem = steps.calculation({"expression": expression})
    lines = [problem.values["expression"], *(line.removeprefix("= ") for line in texts(problem))]
    assert {eval(line.replace("×", "*")) for line in lines} == {eval(expression)}
    assert problem.answer == lines[-1] == str(eval(expression))


def test_a_calculation_by_hand():
    problem = solve("basic_arithmetic", entry(-23, expression="( 1 + -3 * 4 ) * 2 - 2 / 2"))
    assert problem.values == {"expression": "(1 + (-3) × 4) × 2 - 2 / 2"}
    assert texts(problem) == [
        "= (1 + (-12)) × 2 - 2 / 2",
        "= -11 × 2 - 2 / 2",
        "= -22 - 2 / 2",
        "= -22 - 1",
        "= -23",
    ]


@pytest.mark.parametrize("expression", ["7 / 2", "5 + 1 / ( 2 - 2 )", "-( 7 / 2 ) * 4"])
def test_a_division_that_is_not_even_is_refused(expression):
    assert solve("basic_arithmetic", entry(0, expression=expression)) == steps.NOT_EVEN


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_products(a, b):
    problem = solve("products", entry(a * b, expression=f"{a} * {b}"))
    for line in texts(problem):
        assert eval(line.removeprefix("= ").replace("×", "*")) == a * b


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_divisors_multiples_and_fractions(a, b):
    divisor = math.gcd(a, b)
    gcd = solve("gcd", entry(divisor, numbers=[a, b]))
    assert gcd.steps[-1] == ("divisor", {"divisor": divisor})
    lcm = solve("lcm", entry(math.lcm(a, b), numbers=[a, b]))
    assert texts(lcm)[-1] == f"{a} × {b} / {divisor} = {math.lcm(a, b)}"
    small = f"{a // divisor}/{b // divisor}"
    values = {"numerator": a, "denominator": b}
    assert solve("fraction_simplification", entry(small, **values)).answer == small


def test_euclid_by_hand():
    problem = solve("gcd", entry(3, numbers=[21, 69]))
    assert texts(problem) == ["69 = 3 × 21 + 6", "21 = 3 × 6 + 3", "6 = 2 × 3 + 0", "divisor"]


@pytest.mark.parametrize(
    "style", ["{}/{}", "${}/{}$", r"$\frac{{{}}}{{{}}}$", r"$\dfrac{{{}}}{{{}}}$"]
)
def test_a_fraction_in_every_style_of_the_library(style):
    given = entry(style.format(2, 3), numerator=8, denominator=12)
    assert solve("fraction_simplification", given).answer == "2/3"


@given(st.integers(2, 5000))
def test_factorization_multiplies_back(number):
    problem = steps.factorization({"number": number})
    factors = [int(f) for f in problem.answer.split(" × ")]
    assert math.prod(factors) == number
    assert all(all(f % d for d in range(2, math.isqrt(f) + 1)) for f in factors)
    assert problem.steps[-1] == ("prime", {"number": factors[-1]})


@given(st.integers(-99, 99), st.integers(-99, 99), st.integers(-99, 99))
def test_equations(factor, constant, x):
    text = f"{factor}*k + {constant} = {factor * x + constant}"
    problem = solve("simple_equations", entry(x, variable="k", equation=text))
    if not factor:
        assert problem == "any number solves it"
    else:
        assert problem.answer == str(x)
        name, values = problem.steps[-1]
        left, right = values["equation"].replace("×", "*").split(" = ")
        assert name == "check" and eval(left) == eval(right) == factor * x + constant


def test_an_equation_with_the_variable_last_by_hand():
    given = entry(58, variable="d", equation="242 - 35*d = -1788")
    problem = solve("simple_equations", given)
    assert problem.values == {"variable": "d", "equation": "242 - 35 × d = -1788"}
    assert texts(problem) == ["-35 × d = -1788 - 242 = -2030", "d = -2030 / (-35) = 58", "check"]
    assert problem.steps[-1][1] == {"equation": "-35 × 58 + 242 = -1788"}


def test_an_equation_without_its_variable():
    given = entry(83, variable="o", equation="0 = 0")
    assert solve("simple_equations", given) == "any number solves it"


def test_angles():
    given = entry(108, n_sides=4, known_angles=[104.0, 106.0, 42.0])
    assert texts(solve("simple_geometry", given)) == [
        "angle_sum",
        "104° + 106° + 42° = 252°",
        "360° - 252° = 108°",
    ]
    reflex = entry(331, n_sides=6, known_angles=[100.0, 100.0, 100.0, 50.0, 39.0])
    assert solve("simple_geometry", reflex) == "no such convex polygon"


def test_legs():
    problem = solve("leg_counting", entry(26, animals={"dog": 3, "bee": 2, "bird": 1}))
    assert problem.steps[-1] == ("equation", {"text": "12 + 12 + 2 = 26"})
    assert problem.steps[0] == ("legs", {"animal": "dog", "equation": "3 × 4 = 12"})
    starfish = entry(5, animals={"starfish": 1})
    assert solve("leg_counting", starfish) == "an animal whose legs are in doubt"


def test_another_answer_than_the_library_gives_is_refused():
    assert solve("gcd", entry(4, numbers=[69, 21])) == steps.ANOTHER_ANSWER
    assert isinstance(solve("gcd", entry(3, numbers=[69, 21])), Problem)
