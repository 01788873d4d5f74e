"""A synthetic tool environment with verifiable tasks, and the filter that tasks have to pass.

reported: LLMs write environments of a scenario, tools and pass criteria; tasks that are unrealistic
or cannot be solved are filtered out; hundreds of verifiable tasks remain. Not published: formats,
generators, thresholds. chosen: rules write this one, a stockroom, and a task is kept if a scripted
oracle passes it while saying nothing and guessing both fail.

A task passes on what is left at the end: the state of the stockroom and the number or name in the
answer. How it got there does not count, so any sequence of calls that works is right.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kexa.agents.episode import Episode, run_episodes
from kexa.agents.policies import (
    Guesser,
    Message,
    Policy,
    Request,
    ScriptedPolicy,
    call,
    say,
    silent,
)
from kexa.agents.tools import Refused, Tool, Toolbox

SCENARIO = "You run a stockroom. Use the tools. End with a short answer."
SUPPLIED = ("lamp", "chair", "desk", "shelf", "clock", "mirror", "carpet", "kettle", "ladder")
ITEMS = (*SUPPLIED, "bucket", "hammer", "pillow")  # the last three cannot be ordered


@dataclass
class Stockroom:
    """The state: units in stock by item, and units on order."""

    stock: dict[str, int]
    orders: dict[str, int] = field(default_factory=dict)

    def toolbox(self) -> Toolbox:
        """Tools that read and change this stockroom."""
        item = {"item": {"type": "string"}}
        units = item | {"units": {"type": "integer"}}
        return Toolbox(
            [
                Tool("stock", "Units of an item in stock.", item, self._stock),
                Tool("order", "Order units of an item.", units, self._order),
                Tool("cancel", "Cancel the order of an item.", item, self._cancel),
            ]
        )

    def _stock(self, item: str) -> str:
        if item not in self.stock:
            raise Refused(f"no item {item!r}")
        return str(self.stock[item])

    def _order(self, item: str, units: int) -> str:
        if item not in SUPPLIED:
            raise Refused(f"{item!r} cannot be ordered")
        if units < 1:
            raise Refused(f"cannot order {units} units")
        self.orders[item] = self.orders.get(item, 0) + units
        return f"ordered {units} {item}"

    def _cancel(self, item: str) -> str:
        if item not in self.orders:
            raise Refused(f"no order of {item!r}")
        return f"cancelled {self.orders.pop(item)} {item}"


@dataclass(frozen=True)
class Task:
    """An instruction, the state it starts from, what must hold at the end, and one way there."""

    kind: str
    instruction: str
    start: Stockroom
    passes: Callable[[Stockroom, str], bool]
    oracle: Callable[[], Iterator[Message]]

    def opening(self) -> list[Message]:
        return [
            {"role": "system", "content": SCENARIO},
            {"role": "user", "content": self.instruction},
        ]


@dataclass(frozen=True)
class Outcome:
    """An episode of a task and whether the end state and the answer pass."""

    task: Task
    episode: Episode
    passed: bool


def run_tasks(policy: Policy, tasks: Sequence[Task], max_steps: int = 6) -> list[Outcome]:
    """Run every task from a copy of its start and judge what is left."""
    rooms = [copy.deepcopy(task.start) for task in tasks]
    openings = [task.opening() for task in tasks]
    episodes = run_episodes(policy, openings, [room.toolbox() for room in rooms], max_steps)
    return [
        Outcome(task, episode, task.passes(room, episode.answer))
        for task, room, episode in zip(tasks, rooms, episodes, strict=True)
    ]


def oracle(tasks: Sequence[Task]) -> Policy:
    """The policy that follows each task's own script, which depends on its instruction alone."""
    scripts = {task.instruction: task.oracle for task in tasks}

    def script(request: Request) -> Iterator[Message]:
        [instruction] = [m["content"] for m in request.messages if m["role"] == "user"]
        return scripts[instruction]()

    return ScriptedPolicy(script)


def screen(tasks: Sequence[Task], guesses: int = 8) -> tuple[list[Task], dict[str, int]]:
    """Keep the tasks that can be solved and are not solved by accident.

    Returns:
        The kept tasks in order, and how many fell by reason.
    """
    verdicts = {
        "the oracle fails": [not o.passed for o in run_tasks(oracle(tasks), tasks)],
        "saying nothing passes": [o.passed for o in run_tasks(silent, tasks)],
        "guessing passes": [False] * len(tasks),
    }
    for seed in range(guesses):
        for i, outcome in enumerate(run_tasks(Guesser(seed), tasks)):
            verdicts["guessing passes"][i] |= outcome.passed
    reasons = [next((r for r in verdicts if verdicts[r][i]), "") for i in range(len(tasks))]
    kept = [task for task, reason in zip(tasks, reasons, strict=True) if not reason]
    return kept, {reason: reasons.count(reason) for reason in verdicts}


def candidates(count: int, seed: int) -> list[Task]:
    """Draw task candidates, kinds in turn.

    Not all pass the filter: some orders the supplier refuses, some conditions ask for nothing.
    """
    rng = random.Random(f"stockroom {seed}")
    return [_KINDS[i % len(_KINDS)](rng) for i in range(count)]


def _room(rng: random.Random) -> Stockroom:
    return Stockroom({item: rng.randint(2, 99) for item in ITEMS})


def _number_is(answer: str, number: int) -> bool:
    return re.findall(r"\d+", answer) == [str(number)]


def _lookup(rng: random.Random) -> Task:
    room, item = _room(rng), rng.choice(ITEMS)

    def script():
        units = yield call("stock", item=item)
        yield say(f"{units} {item}")

    return Task(
        "lookup",
        f"How many units of {item} are in stock?",
        room,
        lambda end, answer: end == room and _number_is(answer, room.stock[item]),
        script,
    )


def _order(rng: random.Random) -> Task:
    room, item, units = _room(rng), rng.choice(ITEMS), rng.randint(2, 50)

    def script():
        result = yield call("order", item=item, units=units)
        yield say(result)

    return Task(
        "order",
        f"Order {units} units of {item}.",
        room,
        lambda end, _: end == Stockroom(room.stock, {item: units}),
        script,
    )


def _refill(rng: random.Random) -> Task:
    room, item, level = _room(rng), rng.choice(SUPPLIED), rng.randint(20, 80)
    wanted = {item: level - room.stock[item]} if room.stock[item] < level else {}

    def script():
        units = int((yield call("stock", item=item)))
        if units < level:
            yield call("order", item=item, units=level - units)
        yield say("done")

    return Task(
        "refill",
        f"Fill up {item} to {level} units, unless there are as many.",
        room,
        lambda end, _: end == Stockroom(room.stock, wanted),
        script,
    )


def _cancel(rng: random.Random) -> Task:
    room = _room(rng)
    room.orders.update({item: rng.randint(2, 50) for item in rng.sample(SUPPLIED, 3)})
    item, other = rng.sample(sorted(room.orders), 2)
    left = {i: units for i, units in room.orders.items() if i not in (item, other)}

    def script():
        yield call("cancel", item=item)
        yield call("cancel", item=other)
        yield say("done")

    return Task(
        "cancel",
        f"Cancel the orders of {item} and {other}.",
        room,
        lambda end, _: end == Stockroom(room.stock, left),
        script,
    )


def _compare(rng: random.Random) -> Task:
    room = _room(rng)
    pair = rng.sample(ITEMS, 2)
    more, fewer = sorted(pair, key=lambda item: -room.stock[item])

    def script():
        first = int((yield call("stock", item=pair[0])))
        second = int((yield call("stock", item=pair[1])))
        yield say(pair[second > first])

    return Task(
        "compare",
        f"Are there more units of {pair[0]} or of {pair[1]}?",
        room,
        lambda end, answer: end == room and more in answer and fewer not in answer,
        script,
    )


def _total(rng: random.Random) -> Task:
    room, pair = _room(rng), rng.sample(ITEMS, 2)

    def script():
        first = int((yield call("stock", item=pair[0])))
        second = int((yield call("stock", item=pair[1])))
        yield say(f"{first + second} units")

    return Task(
        "total",
        f"How many units of {pair[0]} and {pair[1]} are there together?",
        room,
        lambda end, answer: end == room and _number_is(answer, sum(room.stock[i] for i in pair)),
        script,
    )


_KINDS = (_lookup, _order, _refill, _cancel, _compare, _total)
