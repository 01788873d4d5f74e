"""Each policy against conversations small enough to follow by eye."""

import http.server
import json
import threading

import pytest
import torch

from kexa.agents.policies import (
    EndpointPolicy,
    Guesser,
    Meter,
    ModelPolicy,
    Reply,
    Request,
    ScriptedPolicy,
    ShortMemory,
    call,
    say,
    silent,
)
from kexa.model import KexaForCausalLM, ModelConfig
from kexa.tokenizer import SPECIAL_TOKENS, bpe

ASK = [{"role": "system", "content": "rules"}, {"role": "user", "content": "How many 7 lamps?"}]
STOCK = {
    "name": "stock",
    "description": "",
    "parameters": {"type": "object", "properties": {"item": {"type": "string"}}},
}


def words(messages):
    return sum(len(m["content"].split()) for m in messages)


def test_a_script_sees_each_tool_result_once():
    def script(request):
        first = yield call("stock", item="lamp")
        second = yield call("stock", item=first)
        yield say(f"{first} {second}")

    policy = ScriptedPolicy(script)
    messages = list(ASK)
    for result in ("a", "b"):
        [reply] = policy([Request(messages)])
        messages += [reply.message, {"role": "tool", "content": result}]
    assert policy([Request(messages)]) == [Reply(say("a b"))]


def test_the_guesser_repeats_and_ends():
    requests = [Request(ASK, [STOCK])]
    assert Guesser(1)(requests) == Guesser(1)(requests)
    guesses = {json.dumps(Guesser(seed)(requests)[0].message) for seed in range(20)}
    assert len(guesses) > 3
    done = [*ASK, *[{"role": "tool", "content": "x"}] * 3]
    assert "tool_calls" not in Guesser(1)([Request(done, [STOCK])])[0].message
    assert silent(requests) == [Reply(say(""))]


def test_short_memory_keeps_the_task_and_the_latest():
    seen = []

    def record(requests):
        seen.extend(requests)
        return silent(requests)

    later = [{"role": "tool", "content": f"{i} b c"} for i in range(5)]
    ShortMemory(record, 12, words)([Request([*ASK, *later])])
    assert seen[0].messages == [*ASK, *later[-2:]]  # 1 + 4 words, then 3 each
    ShortMemory(record, 1, words)([Request([*ASK, *later])])
    assert seen[1].messages == ASK


def test_the_meter_counts_what_is_sent():
    meter = Meter(silent, words)
    meter([Request(ASK), Request(ASK[1:])])
    assert meter.sent == [5, 4]


@pytest.fixture(scope="module")
def model_policy():
    vocab = [*SPECIAL_TOKENS, *bpe.byte_alphabet()]
    tokenizer = bpe.build(vocab, [], r"\S+|\s", "NFC")
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=len(vocab), hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=64, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, sliding_window=8, max_position_embeddings=512,
    )  # fmt: skip
    return ModelPolicy(KexaForCausalLM(config), tokenizer, max_new_tokens=12, context=200)


def test_the_model_reports_cut_replies_and_full_contexts(model_policy):
    long = [*ASK, {"role": "user", "content": "x" * 300}]
    replies = model_policy([Request(long), Request(ASK), Request(ASK, [STOCK] * 9)])
    assert [r.ending for r in replies] == ["context full", "cut off", "context full"]
    assert replies[0].message == say("")


def test_the_model_answers_alike_alone_and_in_a_batch(model_policy):
    other = [{"role": "user", "content": "Hi"}]
    together = model_policy([Request(ASK), Request(other)])
    assert [*model_policy([Request(ASK)]), *model_policy([Request(other)])] == together


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with what ``answers`` holds and keeps the request bodies."""

    answers: list
    bodies: list

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append((self.path, self.headers["Authorization"], json.loads(body)))
        payload = json.dumps(self.answers.pop(0)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.answers, Server.bodies = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/v1/"
        httpd.shutdown()
        thread.join()


def choice(message, finish="stop"):
    return {"choices": [{"message": message, "finish_reason": finish}]}


def test_an_endpoint_is_spoken_to_in_its_protocol(server):
    function = {"name": "stock", "arguments": '{"item": "lamp"}'}
    Server.answers += [
        choice({"content": None, "tool_calls": [{"id": "x", "function": function}]}),
        choice({"content": "seven"}, "length"),
        choice({"content": "", "tool_calls": [{"function": {"name": "stock", "arguments": "{"}}]}),
        {"error": "busy"},
    ]
    policy = EndpointPolicy(server, "some-model", key="k", temperature=0.5)
    [first] = policy([Request(ASK, [STOCK])])
    assert first == Reply(call("stock", item="lamp"))
    messages = [*ASK, first.message, {"role": "tool", "content": "7"}]
    [second] = policy([Request(messages)])
    assert second == Reply(say("seven"), "cut off")
    [third] = policy([Request(ASK)])
    assert third.message["content"].startswith("<tool_call>")
    with pytest.raises(ValueError, match="sent no chat completion: {'error': 'busy'}"):
        policy([Request(ASK)])

    path, key, body = Server.bodies[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert body["tools"] == [{"type": "function", "function": STOCK}]
    assert (body["model"], body["temperature"]) == ("some-model", 0.5)
    sent = Server.bodies[1][2]["messages"]
    assert sent[2]["tool_calls"][0]["id"] == sent[3]["tool_call_id"]
    assert json.loads(sent[2]["tool_calls"][0]["function"]["arguments"]) == {"item": "lamp"}
