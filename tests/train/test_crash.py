"""A slice of what ``python -m benchmarks.crash`` does."""

from benchmarks.crash import crash


def test_kills_damages_and_sigterm_lose_nothing(tmp_path):
    found = crash(tmp_path, kills=3, flips=20, steps=20)
    assert found["holds"], found
    assert found["damaged"]["flips"] and found["damaged"]["truncations"]
