"""Preference rewards by hand; the rule judge; the endpoint judge against a local server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kexa.post.judge import (
    RUBRIC,
    EndpointJudge,
    Request,
    preference_reward,
    rule_judge,
    score_groups,
)
from kexa.post.rewards import NoCommas, Verdict
from kexa.post.rollout import Group, Response

NAMES = tuple(RUBRIC)


def test_reward_by_hand():
    scores = {"a": 0.5, "b": 0.0}
    assert preference_reward(Verdict("right"), scores, 0.5) == 0.625
    assert preference_reward(Verdict("wrong"), scores, 0.5) == 0.125
    assert preference_reward(None, scores, 0.5) == 0.25


@pytest.mark.parametrize(
    "dimension, request_, good, bad",
    [
        ("language", "How are you?", "I am fine.", "저는 잘 지내요."),
        ("language", "잘 지내세요?", "네, 잘 지내요.", "I am fine."),
        ("language", "元気ですか", "はい、元気です。", "네, 잘 지내요."),
        ("concise", "Hi", "Hello.", "Hello " * 30),
        ("varied", "Hi", "Hello to you.", "hello hello hello"),
        ("on topic", "Do you like music?", "Music is fine.", "It rains."),
        ("on topic", "음악을 좋아해요?", "음악을 좋아해요.", "비가 와요."),
        ("varied", "こんにちは", "はい、元気です。", "猫猫猫猫猫猫"),
        ("on topic", "あなたは音楽が好きですか", "はい、音楽が好きです。", "はい、そうです。"),
        ("on topic", "Bạn có thích nhạc không?", "Tôi thích nhạc.", "có có."),
        ("on topic", "Do you like art?", "You like it.", "Dislikes."),
        ("well formed", "Hi", "Hello.", "Hello and"),
    ],
)
def test_the_rule_judge_prefers_the_better_reply(dimension, request_, good, bad):
    scores = [rule_judge(request_, reply, [dimension])[dimension] for reply in (good, bad)]
    assert scores[0] == 1.0
    assert scores[1] < 0.6


@given(st.text(), st.text())
def test_rule_scores_lie_in_the_unit_interval(request, response):
    scores = rule_judge(request, response, NAMES)
    assert tuple(scores) == NAMES
    assert all(0 <= s <= 1 for s in scores.values())


def test_an_empty_reply_earns_nothing():
    assert set(rule_judge("Hi", " ...", NAMES).values()) == {0.0}


def test_numbers_are_in_every_language():
    assert rule_judge("쓰세요: 7", "7 7 7", ["language"]) == {"language": 1.0}


def test_groups_are_scored_by_rule_and_rubric():
    """Half of a constrained reply's reward is its rule's; a chat reply has the rubric alone."""
    replies = [Response([1], [0.0], True, "", text) for text in ("Yes it is.", "Yes, it is.")]
    requests = [Request("Is it good? No commas.", NoCommas()), Request("Is it good?")]
    rewards, parts = score_groups(requests, [Group([1], replies)] * 2, rule_judge, 0.5)
    assert parts["rule"][0].tolist() == [1.0, 0.0] and parts["rule"][1].isnan().all()
    assert parts["on topic"].tolist() == [[0.0, 0.0]] * 2
    assert rewards.tolist() == [pytest.approx([0.5 + 0.4, 0.4]), pytest.approx([0.8, 0.8])]


def test_an_unknown_dimension_is_refused_by_name():
    with pytest.raises(ValueError, match="no rule for 'kind'"):
        rule_judge("Hi", "Hello.", ["kind"])


@pytest.fixture
def server():
    """A server that answers with ``server.content`` and keeps what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.asked = self.path, self.headers["Authorization"], json.loads(body)
            message = {"choices": [{"message": {"content": self.server.content}}]}
            payload = json.dumps(message).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def judge(server):
    return EndpointJudge(f"http://127.0.0.1:{server.server_port}/v1", "some-model", "key")


def test_the_endpoint_judge_asks_every_question_and_scales_the_scores(server):
    server.content = 'Sure: {"language": 10, "varied": 2.5}'
    assert judge(server)("Hi", "Hello.", ["language", "varied"]) == {
        "language": 1.0,
        "varied": 0.25,
    }
    path, key, body = server.asked
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer key", "some-model")
    prompt = body["messages"][0]["content"]
    assert all(text in prompt for text in (RUBRIC["language"], RUBRIC["varied"], "Hello."))


@pytest.mark.parametrize(
    "content", ["no", "{}", '{"language": 11}', '{"language": "10"}', "{x}", "[]"]
)
def test_an_answer_without_scores_is_an_error_not_a_low_score(server, content):
    server.content = content
    with pytest.raises(ValueError, match="expected JSON"):
        judge(server)("Hi", "Hello.", ["language"])
