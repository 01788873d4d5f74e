"""Every way an episode can go, with policies that do exactly one thing."""

import pytest

from kexa.agents.episode import NOT_A_CALL, StopReason, run_episodes
from kexa.agents.policies import Reply, ScriptedPolicy, call, say
from kexa.agents.tools import Tool, Toolbox

ASK = [{"role": "user", "content": "go"}]


def toolbox():
    return Toolbox([Tool("echo", "", {"word": {"type": "string"}}, lambda word: word.upper())])


def always(message, ending="complete"):
    return lambda requests: [Reply(message, ending) for _ in requests]


def run(policy, max_steps=3, rewrite=None):
    [episode] = run_episodes(policy, [ASK], [toolbox()], max_steps, rewrite)
    return episode


def test_an_answer_ends_it():
    episode = run(always(say("done")))
    assert (episode.stop, episode.answer) == (StopReason.ANSWERED, "done")
    assert episode.messages == [*ASK, say("done")]


def test_results_come_back_in_order():
    def script(request):
        result = yield call("echo", word="a")
        yield say(result)

    episode = run(ScriptedPolicy(script))
    assert episode.answer == "A"
    assert [m["role"] for m in episode.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("policy", "stop", "malformed", "refused", "repeated"),
    [
        (always(call("echo", word="a")), StopReason.STEP_LIMIT, 0, 0, 2),
        (always(call("eco", word="a")), StopReason.STEP_LIMIT, 0, 3, 2),
        (always(call("echo", word=1)), StopReason.STEP_LIMIT, 0, 3, 2),
        (always(say("<tool_call>{</tool_call>")), StopReason.STEP_LIMIT, 3, 0, 0),
        (always(say(""), "cut off"), StopReason.CUT_OFF, 0, 0, 0),
        (always(say(""), "context full"), StopReason.CONTEXT_FULL, 0, 0, 0),
    ],
)
def test_what_goes_wrong_is_an_outcome(policy, stop, malformed, refused, repeated):
    episode = run(policy)
    found = (episode.stop, episode.malformed, episode.refused, episode.repeated)
    assert found == (stop, malformed, refused, repeated)
    assert episode.answer == ""


def test_a_malformed_call_is_answered():
    episode = run(always(say("<tool_call>{")), max_steps=1)
    assert episode.messages[-1] == {"role": "tool", "content": NOT_A_CALL}


def test_the_rewrite_hook_sees_every_step_but_the_last_one():
    steps = []

    def rewrite(step, messages):
        steps.append(step)
        return messages[:1]

    def script(request):
        yield call("echo", word="a") if len(steps) < 2 else say("end")

    episode = run(ScriptedPolicy(lambda request: script(request)), 5, rewrite)
    assert steps == [1, 2]
    assert episode.messages == [*ASK, say("end")]


def test_episodes_run_side_by_side():
    sizes = []

    def policy(requests):
        sizes.append(len(requests))
        return [
            Reply(say("x") if r.messages[0]["content"] == "1" else call("echo", word="a"))
            for r in requests
        ]

    conversations = [[{"role": "user", "content": str(i)}] for i in range(3)]
    episodes = run_episodes(policy, conversations, [toolbox() for _ in range(3)], 2)
    assert sizes == [3, 2]
    assert [e.stop for e in episodes] == [
        StopReason.STEP_LIMIT,
        StopReason.ANSWERED,
        StopReason.STEP_LIMIT,
    ]
