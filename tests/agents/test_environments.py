"""The stockroom: what its tools do, what its tasks accept, and what the filter lets through."""

import copy

import pytest

from kexa.agents.environments import SUPPLIED, Stockroom, candidates, oracle, run_tasks, screen
from kexa.agents.policies import Guesser, ScriptedPolicy, call, say, silent
from kexa.data.chat import encode_chat
from kexa.tokenizer import SPECIAL_TOKENS, bpe


@pytest.fixture(scope="module")
def tasks():
    return screen(candidates(60, seed=3))[0]


def test_tools_read_and_change_the_state():
    room = Stockroom({"lamp": 5, "pillow": 1})
    tools = room.toolbox()
    assert tools.call("stock", {"item": "lamp"}).content == "5"
    assert tools.call("order", {"item": "lamp", "units": 2}).ok
    assert tools.call("order", {"item": "lamp", "units": 3}).ok
    assert room.orders == {"lamp": 5}
    assert tools.call("cancel", {"item": "lamp"}).content == "cancelled 5 lamp"
    assert room == Stockroom({"lamp": 5, "pillow": 1})
    for name, arguments in (
        ("stock", {"item": "tree"}),
        ("order", {"item": "pillow", "units": 1}),
        ("order", {"item": "lamp", "units": 0}),
        ("cancel", {"item": "lamp"}),
    ):
        assert not tools.call(name, arguments).ok


def test_kept_tasks_are_solvable_and_not_by_accident(tasks):
    assert {task.kind for task in tasks} == {
        "lookup", "order", "refill", "cancel", "compare", "total",
    }  # fmt: skip
    assert all(o.passed for o in run_tasks(oracle(tasks), tasks))
    assert not any(o.passed for o in run_tasks(silent, tasks))
    for seed in range(8):
        assert not any(o.passed for o in run_tasks(Guesser(seed), tasks))


def test_the_filter_names_what_it_drops():
    drawn = candidates(60, seed=3)
    kept, dropped = screen(drawn)
    assert len(kept) + sum(dropped.values()) == len(drawn)
    assert dropped["the oracle fails"] > 0  # orders of what is not supplied
    assert dropped["saying nothing passes"] > 0  # refills that ask for nothing
    unsupplied = [
        t for t in drawn if t.kind == "order" and t.instruction.split()[-1][:-1] not in SUPPLIED
    ]
    assert unsupplied
    assert not {t.instruction for t in unsupplied} & {t.instruction for t in kept}


def test_tasks_start_afresh_and_repeat(tasks):
    before = copy.deepcopy([task.start for task in tasks])
    first = [o.episode.answer for o in run_tasks(oracle(tasks), tasks)]
    assert [task.start for task in tasks] == before
    assert [o.episode.answer for o in run_tasks(oracle(tasks), tasks)] == first
    again = candidates(60, seed=3)
    assert [t.instruction for t in again] == [t.instruction for t in candidates(60, seed=3)]


def test_side_effects_fail_a_task(tasks):
    """The right answer with an order nobody asked for."""
    task = next(t for t in tasks if t.kind == "lookup")
    item = task.instruction.split()[4]

    def script(request):
        yield call("order", item="lamp", units=1)
        yield say(str(task.start.stock[item]))

    [outcome] = run_tasks(ScriptedPolicy(script), [task])
    assert not outcome.passed


def test_another_way_to_the_same_end_passes(tasks):
    task = next(t for t in tasks if t.kind == "order")
    _, units, _, _, item = task.instruction.rstrip(".").split()

    def script(request):
        yield call("order", item=item, units=1)
        yield call("order", item=item, units=int(units) - 1)
        yield say("")

    [outcome] = run_tasks(ScriptedPolicy(script), [task])
    assert outcome.passed


def test_trajectories_are_chats_that_carry_loss_on_the_assistant_only(tasks):
    tokenizer = bpe.build([*SPECIAL_TOKENS, *bpe.byte_alphabet()], [], r"\S+|\s", "NFC")
    [outcome] = run_tasks(oracle(tasks), tasks[:1])
    tools = tasks[0].start.toolbox().declarations
    ids, mask = encode_chat(tokenizer, outcome.episode.messages, tools)
    learned = tokenizer.decode(
        [i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False
    )
    assert learned.startswith("<tool_call>")
    assert "<tool_result>" not in learned
