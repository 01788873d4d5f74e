"""The endpoint: its protocol, its patience, its cache, and what it says when it fails."""

import json
import threading

import pytest

from kexa.data.synthesis import Endpoint, SynthesisError
from kexa.data.synthesis.endpoint import KEY_VARIABLE, Reply


@pytest.fixture(autouse=True)
def no_key(cache, monkeypatch):
    """A cache of its own, and no key from the environment."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_request_and_reply(server, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    url, requests = server(lambda body, _: (200, {}, " hello \n"))
    endpoint = Endpoint(f"{url}/", "tiny", temperature=0.5, max_tokens=9)
    assert endpoint("Say hello.", seed=3) == Reply("hello", True)
    [(path, headers, body)] = requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Say hello."}],
        "temperature": 0.5,
        "seed": 3,
        "max_tokens": 9,
    }


def test_without_a_key_none_is_sent(server):
    url, requests = server(lambda body, _: (200, {}, "hello"))
    Endpoint(url, "tiny")("Say hello.", 0)
    assert "Authorization" not in requests[0][1]


def test_a_second_run_asks_nothing(server, cache):
    url, requests = server(lambda body, number: (200, {}, f"answer {number}"))
    first = [Endpoint(url, "tiny")(prompt, 0) for prompt in "ab"]
    assert [Endpoint(url, "tiny")(prompt, 0) for prompt in "ab"] == first
    assert len(requests) == 2
    Endpoint(url, "tiny")("a", 1)  # another seed is another request, and so is another model
    Endpoint(url, "large")("a", 0)
    assert len(requests) == 4
    kept = list((cache / "synthesis").rglob("*.json"))
    assert len(kept) == 4
    assert all("secret" not in path.read_text() for path in kept)


def test_a_cut_cache_file_is_asked_for_again(server, cache):
    url, requests = server(lambda body, _: (200, {}, "hello"))
    Endpoint(url, "tiny")("a", 0)
    [kept] = (cache / "synthesis").rglob("*.json")
    kept.write_text(kept.read_text()[:20])
    assert Endpoint(url, "tiny")("a", 0) == Reply("hello", True)
    assert len(requests) == 2


def test_a_cut_reply_is_marked(server):
    choice = {"message": {"content": "half a"}, "finish_reason": "length"}
    url, _ = server(lambda body, _: (200, {}, json.dumps({"choices": [choice]}).encode()))
    assert Endpoint(url, "tiny")("a", 0) == Reply("half a", False)


def test_a_reply_with_a_lone_surrogate_can_be_kept(server):
    choice = b'{"choices": [{"message": {"content": "a \\ud800 b \\ud83d\\ude00\\r\\n"}}]}'
    url, requests = server(lambda body, _: (200, {}, choice))
    for _ in range(2):
        assert Endpoint(url, "tiny")("a", 0) == Reply("a \ufffd b \U0001f600", True)
    assert len(requests) == 1


def test_busy_servers_are_tried_again_with_longer_pauses(server):
    answers = [(429, {"Retry-After": "7"}, b""), (503, {}, b""), (500, {}, b"")]
    url, requests = server(lambda body, n: answers[n - 1] if n <= 3 else (200, {}, "at last"))
    pauses = []
    assert Endpoint(url, "tiny", pause=pauses.append)("a", 0) == Reply("at last", True)
    assert pauses == [7.0, 2.0, 4.0]
    assert len(requests) == 4


def test_a_server_that_stays_busy_ends_with_a_sentence(server):
    url, requests = server(lambda body, _: (503, {"Retry-After": "9999"}, b"overloaded"))
    pauses = []
    with pytest.raises(
        SynthesisError, match=r"/v1/chat/completions answered 503 .*: overloaded, 3 t"
    ):
        Endpoint(url, "tiny", attempts=3, pause=pauses.append)("a", 0)
    assert pauses == [60.0, 60.0]
    assert len(requests) == 3


def test_a_silent_server_is_tried_again(server):
    waits = threading.Event()
    url, requests = server(lambda body, n: (waits.wait(5), (200, {}, "late"))[1])
    with pytest.raises(
        SynthesisError, match="was silent for 0.1 seconds, 2 times; try again later"
    ):
        Endpoint(url, "tiny", timeout=0.1, attempts=2, pause=lambda _: None)("a", 0)
    waits.set()
    assert len(requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_tried_again(server, status):
    url, requests = server(lambda body, _: (status, {}, b"no such model"))
    with pytest.raises(
        SynthesisError,
        match=f"answered {status} .*no such model; check the address, the model 'tiny'",
    ):
        Endpoint(url, "tiny")("a", 0)
    assert len(requests) == 1


@pytest.mark.parametrize("reply", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{}]}'])
def test_an_answer_that_is_no_completion(server, cache, reply):
    url, _ = server(lambda body, _: (200, {}, reply))
    with pytest.raises(SynthesisError, match="sent no chat completion"):
        Endpoint(url, "tiny")("a", 0)
    assert not (cache / "synthesis").exists()


def test_nobody_there():
    with pytest.raises(SynthesisError, match="cannot be reached .*: start the server or correct"):
        Endpoint("http://127.0.0.1:9/v1", "tiny")("a", 0)


def test_an_address_of_another_kind():
    with pytest.raises(SynthesisError, match="'file:///etc': an address starts with http"):
        Endpoint("file:///etc", "tiny")
