"""Token files: what is written, what is refused, and that processes change nothing."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from kexa.data import Mixture
from kexa.data.packing import literal
from kexa.tokenizer import CorpusEncoder, bpe, encode_corpus, open_corpus, token_files
from kexa.tokenizer.encoding_process import EncodingProcess


@pytest.fixture(scope="module")
def documents(corpora):
    return [*corpora["en"][:20], "", *corpora["ko"][:20], "nul \0 and <|user|>", "한국어\n"]


def test_documents_come_back_one_by_one(tokenizer, documents, tmp_path):
    written = encode_corpus(tokenizer, iter(documents), tmp_path / "new")
    assert len(written) == len(documents)
    assert isinstance(written.tokens, np.memmap)
    rows = CorpusEncoder(tokenizer).encode_batch(documents)
    for i, row in enumerate(rows):
        assert written.document(i).tolist() == [1, *row.tolist()]
    with literal(tokenizer):
        assert written.document(0)[1:].tolist() == tokenizer.encode(documents[0]).ids


def test_two_processes_write_the_same_files(tokenizer, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_CHARACTERS_PER_BATCH", 500)
    encode_corpus(tokenizer, documents, tmp_path / "one")
    encode_corpus(tokenizer, documents, tmp_path / "two", processes=2)
    for name in ("tokens.bin", "offsets.npy"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two


def test_processes_need_nothing_of_the_calling_script(tokenizer, documents, tmp_path):
    """A script without a guard, which multiprocessing would run once more in each process."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "script.py").write_text(
        "from tokenizers import Tokenizer\n"
        "from kexa.tokenizer import encode_corpus, token_files\n"
        "print('once')\n"
        "token_files._CHARACTERS_PER_BATCH = 500\n"
        f"tokenizer = Tokenizer.from_file({str(tmp_path / 'tokenizer.json')!r})\n"
        f"encode_corpus(tokenizer, {documents!r}, {str(tmp_path / 'two')!r}, processes=3)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["once"]
    encode_corpus(tokenizer, documents, tmp_path / "one")
    one, two = ((tmp_path / folder / "tokens.bin").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_a_process_that_is_ended_from_outside_is_named(tokenizer, documents):
    with EncodingProcess() as process:
        process.begin(pickle.dumps(CorpusEncoder(tokenizer)))
        ids, ends = process.encode(documents)
        assert len(ends) == len(documents) and ends[-1] == len(ids)
        process._process.kill()
        with pytest.raises(RuntimeError, match="an encoding process ended with code -9"):
            process.encode(documents)


def test_documents_that_fail_end_the_processes(tokenizer, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_CHARACTERS_PER_BATCH", 500)
    with pytest.raises(ValueError, match="document 43 holds the lone surrogate"):
        encode_corpus(tokenizer, [*documents, "\ud800"], tmp_path, processes=2)
    with pytest.raises(ValueError, match="no finished token files in"):
        open_corpus(tmp_path)


def test_batches_of_training_are_read_from_the_files(tokenizer, documents, tmp_path):
    written = encode_corpus(tokenizer, documents, tmp_path)
    input_ids, _ = Mixture({"all": written}, {"all": 1.0}, 64, 2, seed=0).batch(0)
    assert input_ids.shape == (2, 64)
    assert int((input_ids == 1).sum()) > 0


def test_bad_input_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no documents to encode"):
        encode_corpus(tokenizer, [], tmp_path)
    with pytest.raises(ValueError, match="document 2 holds the lone surrogate"):
        encode_corpus(tokenizer, ["a", "b", "\ud800"], tmp_path)
    with pytest.raises(ValueError, match="document 0 is bytes, not str"):
        encode_corpus(tokenizer, [b"\xff"], tmp_path)
    with pytest.raises(ValueError, match="processes=0 must be 1 or more"):
        encode_corpus(tokenizer, ["a"], tmp_path, processes=0)
    nameless = bpe.build(bpe.byte_alphabet(), [], r"\S+|\s", "NFC")
    nameless = type(nameless)(nameless.model)
    with pytest.raises(ValueError, match=r"no \[BOS\] token"):
        encode_corpus(nameless, ["a"], tmp_path)


def test_files_that_are_not_finished_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no finished token files in"):
        open_corpus(tmp_path)
    encode_corpus(tokenizer, ["the of and"], tmp_path)
    with pytest.raises(ValueError, match="document 0 holds the lone surrogate"):
        encode_corpus(tokenizer, ["\ud800"], tmp_path)
    with pytest.raises(ValueError, match="no finished token files in"):
        open_corpus(tmp_path)
    encode_corpus(tokenizer, ["the of and"], tmp_path)
    with open(tmp_path / "tokens.bin", "ab") as file:
        file.write(b"\0" * 4)
    with pytest.raises(ValueError, match=r"has \d+ bytes where offsets.npy counts \d+"):
        open_corpus(tmp_path)
