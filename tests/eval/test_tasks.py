"""Choices by likelihood; parsing, floors and contamination on planted cases."""

import pytest

from kexa.data import Document
from kexa.data.chat import encode_chat
from kexa.data.choices import Choice, encode_option
from kexa.eval import items, tasks
from kexa.eval.items import Benchmark, Problem
from kexa.eval.tasks import contaminated, evaluate
from kexa.model import Completion, StopReason
from kexa.model.likelihood import continuation_logprobs
from kexa.post.rewards import BoxedInteger


def test_a_choice_goes_to_the_highest_logprob_per_byte(model, tokenizer):
    item = Choice("x", "Question: a\nAnswer:", (" b", " cc", " a long option"), 1)
    prompt = [1, *tokenizer.encode(item.prompt).ids]
    pairs = [(prompt, tokenizer.encode(o).ids) for o in item.options]
    per_byte = continuation_logprobs(model, pairs) / [len(o) for o in item.options]
    score = evaluate(model, tokenizer, Benchmark("b", "c", (item,), 1 / 3), 1)
    assert score.outcomes == (("right",) if int(per_byte.argmax()) == 1 else ("wrong",))
    best = Choice("x", item.prompt, item.options, int(per_byte.argmax()))
    assert evaluate(model, tokenizer, Benchmark("b", "c", (best,), 1 / 3), 1).outcomes == ("right",)


def test_every_chat_option_extends_the_same_prompt(tokenizer):
    for item in [*items.tool_calls(8).items, *items.decline_or_help(4).items]:
        encoded = [encode_option(tokenizer, item, option) for option in item.options]
        assert len({tuple(prompt) for prompt, _ in encoded}) == 1
        assert len({tuple(continuation) for _, continuation in encoded}) == len(item.options)
        whole, mask = encode_chat(tokenizer, [*item.prompt, item.options[0]], item.tools)
        assert [t for t, m in zip(whole, mask, strict=True) if m] == encoded[0][1][: sum(mask)]


def written(monkeypatch, tokenizer, texts):
    """Let the model write these texts."""
    end = tokenizer.token_to_id("<|endofturn|>")

    def sample(model, prompts, max_new_tokens, **_):
        ids = [[*tokenizer.encode(text).ids, end] for text in texts]
        return [Completion(i, [0.0] * len(i), StopReason.STOP) for i in ids]

    monkeypatch.setattr(tasks, "sample", sample)


def test_replies_are_right_wrong_or_unreadable(monkeypatch, model, tokenizer):
    question = ({"role": "user", "content": "2+3"},)
    problems = tuple(Problem(str(i), question, BoxedInteger(5)) for i in range(4))
    written(monkeypatch, tokenizer, ["\\boxed{5}", "\\boxed{6}", "five", "so \\boxed{5}."])
    score = evaluate(model, tokenizer, Benchmark("sums", "math", problems, 0.0), 8)
    assert score.outcomes == ("right", "wrong", "unreadable", "right")
    assert score.accuracy.estimate == 0.5
    assert score.parse_rate == 0.75


def test_a_plain_continuation_ends_at_its_stop(monkeypatch, model, tokenizer):
    seen = []
    problem = Problem(
        "p", "def f():\n", lambda text: seen.append(text) or BoxedInteger(0)(text), "\ndef "
    )
    written(monkeypatch, tokenizer, ["    return 1\n\ndef g():\n    pass\n"])
    evaluate(model, tokenizer, Benchmark("code", "coding", (problem,), 0.0), 8)
    assert seen == ["    return 1\n"]


def test_a_benchmark_without_items_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="'empty' has no items"):
        evaluate(model, tokenizer, Benchmark("empty", "c", (), 0.0), 1)


def test_written_benchmarks_run_on_a_real_model(model, tokenizer):
    benchmark = items.verifiable("math", "math", 6, seed=0, max_terms=3, max_number=9)
    first = evaluate(model, tokenizer, benchmark, 6)
    assert first == evaluate(model, tokenizer, benchmark, 6)
    assert first.n == len(first.replies) == 6


def document(text):
    return Document(text, "s", "en", "en", "d")


def test_a_planted_copy_is_found_and_a_shorter_overlap_is_not():
    words = "the quick brown fox jumps over the lazy dog near the old river bank today"
    items_ = (Choice("long", words, ("a", "b"), 0), Choice("short", "what is it", ("a", "b"), 0))
    benchmark = Benchmark("b", "c", items_, 0.5)
    found = lambda text: contaminated([benchmark], [document(text)], n=10)["b"]  # noqa: E731
    copied = words.upper().replace(" ", ",  ")
    assert found(f"Before. {copied} After.") == ["long"]
    assert found(" ".join(words.split()[:10])) == ["long"]
    assert found(" ".join(words.split()[:9]) + " cat") == []
    assert found("So, what is it?") == ["short"]
    with pytest.raises(ValueError, match="n=0"):
        contaminated([benchmark], [], n=0)
