"""Fine-tuning data: whole conversations, balanced modes, loss on what the assistant says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kexa.data import sources
from kexa.post import sft, tasks
from kexa.post.sft import Encoded, PackedChats

sizes = st.lists(st.integers(2, 20), min_size=4, max_size=40)


def conversations(lengths):
    """Conversation i repeats the number i + 1; its second half carries loss."""
    return [Encoded([i + 1] * n, [k >= n // 2 for k in range(n)]) for i, n in enumerate(lengths)]


def examples(count):
    return [
        sft.Example(family, task.language, task.messages(thinking=i % 3 > 0))
        for family in tasks.FAMILIES
        for i, task in enumerate(tasks.generate(family, "sft", count, 0))
    ]


@given(sizes)
def test_every_conversation_is_packed_once_and_whole(lengths):
    chats = PackedChats(conversations(lengths), sequence_length=20, batch_size=1, pad=0, seed=0)
    found = {}
    for ids, documents, mask in zip(
        chats.input_ids, chats.document_ids, chats.loss_mask, strict=True
    ):
        for document in documents[documents >= 0].unique().tolist():
            inside = documents == document
            (number,) = set(ids[inside].tolist())
            assert number not in found
            found[number] = (int(inside.sum()), int(mask[inside].sum()))
        assert ids[documents < 0].eq(0).all()
        assert not mask[documents < 0].any()
    assert found == {i + 1: (n, n - n // 2) for i, n in enumerate(lengths)}


@given(sizes, st.integers(0, 3))
def test_an_epoch_visits_every_row_once_and_is_a_function_of_seed_and_step(lengths, seed):
    def packed():
        return PackedChats(conversations(lengths), 20, 1, pad=0, seed=seed)

    chats, again = packed(), packed()
    rows = [tuple(chats.batch(step)["input_ids"][0].tolist()) for step in range(len(chats))]
    assert sorted(rows) == sorted(map(tuple, chats.input_ids.tolist()))
    step = len(chats) + 1
    for name, value in chats.batch(step).items():
        assert value.equal(again.batch(step)[name])


def test_too_few_rows_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="1 rows of chats do not fill a batch of 4"):
        PackedChats(conversations([3, 3]), 20, 4, pad=0, seed=0)


@pytest.mark.parametrize("ratio", [1.5, 0.5])
def test_modes_are_balanced_by_loss_tokens(tokenizer, ratio):
    encoded = sft.encode_examples(tokenizer, examples(300), max_tokens=200)
    assert encoded[True] and encoded[False]
    reasoning = {id(e) for e in encoded[True]}
    kept = sft.balance(encoded, ratio, seed=0)
    tokens = {True: 0, False: 0}
    for item in kept:
        tokens[id(item) in reasoning] += item.loss_tokens
    assert tokens[True] / tokens[False] == pytest.approx(ratio, rel=0.05)
    available = {mode: sum(e.loss_tokens for e in items) for mode, items in encoded.items()}
    assert any(tokens[mode] > 0.95 * available[mode] for mode in tokens)


def test_a_mode_without_conversations_is_refused_by_name(tokenizer):
    encoded = sft.encode_examples(tokenizer, examples(3)[1:3], max_tokens=200)
    with pytest.raises(ValueError, match="no non-reasoning conversations"):
        sft.balance(encoded, 1.5, seed=0)


def test_conversations_longer_than_a_row_are_left_out(tokenizer):
    encoded = sft.encode_examples(tokenizer, examples(50), max_tokens=40)
    lengths = [len(e.ids) for items in encoded.values() for e in items]
    assert 0 < len(lengths) < 100
    assert max(lengths) <= 40


def test_validation_loss_is_the_mean_over_the_assistants_tokens(model, tokenizer):
    encoded = sft.encode_examples(tokenizer, examples(9), max_tokens=120)
    chats = PackedChats(sft.balance(encoded, 1.5, 0), 120, batch_size=2, pad=0, seed=0)
    total = count = 0
    for step in range(len(chats)):
        batch = chats.batch(step)
        for ids, documents, mask in zip(*batch.values(), strict=True):
            for document in documents[documents >= 0].unique().tolist():
                inside = documents == document
                logprobs = model(ids[inside][None])[0].log_softmax(-1)
                for t in mask[inside].nonzero()[:, 0].tolist():
                    total -= logprobs[t - 1, ids[inside][t]].item()
                    count += 1
    assert sft.validation_loss(model, chats) == pytest.approx(total / count, rel=1e-4)


def test_loss_ignores_what_the_user_says(model, tokenizer):
    """The last hidden state gets a gradient exactly where it predicts an assistant's token."""
    encoded = sft.encode_examples(tokenizer, examples(9), max_tokens=120)
    chats = PackedChats(sft.balance(encoded, 1.5, 0), 120, batch_size=2, pad=0, seed=0)
    batch = chats.batch(0)
    kept = []
    model.model.norm.register_forward_hook(lambda _, inputs, hidden: kept.append(hidden))
    loss = sft.chat_loss(model, batch).next_token
    (grad,) = torch.autograd.grad(loss, kept)
    predicts = torch.zeros_like(batch["loss_mask"])
    predicts[:, :-1] = batch["loss_mask"][:, 1:]
    assert grad[~predicts].eq(0).all()
    assert grad[predicts].abs().amax(-1).gt(0).all()


def test_dialogues_are_split_by_their_first_turn(monkeypatch):
    pairs = "".join(f"- - question {i}?\n  - answer {i}\n" for i in range(300))
    odd = "- - only one turn\n- - a\n  - b\n  - no reply to this\n"
    files = {
        "chatterbot_corpus/data/english/x.yml": f"conversations:\n{pairs}{odd}".encode(),
        "chatterbot_corpus/data/english/x.txt": b"not yaml: [",
        "chatterbot_corpus/data/klingon/x.yml": b"conversations:\n- - nuqneH\n  - nuqneH\n",
    }
    monkeypatch.setattr(sources, "files", lambda card: files)
    train, heldout = sft.dialogues("chatterbot-dialogues", 0.2)
    assert len(train) + len(heldout) == 301
    assert 30 < len(heldout) < 90
    first = [{e.messages[0]["content"] for e in side} for side in (train, heldout)]
    assert not first[0] & first[1]
    assert all(e.messages[-1]["role"] == "assistant" and not e.reasons for e in train + heldout)
    assert sft.dialogues("chatterbot-dialogues", 0.0)[1] == []
