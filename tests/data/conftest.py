"""Tiny wheels and cards, and a cache of their own, so that no test here needs a network."""

import hashlib
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

CARD = """---
pretty_name: Tiny
license: mit
language: [en]
size_categories: [n<1K]
kexa:
  kind: {kind}
  package: {package}
  version: "1.0"
  sha256: {sha256}
  reader: {reader}
  origin: {origin}
  categories: {categories}
---

# Tiny

## Contents

Text.

## Licence

MIT.

## Known faults

- None.

## Use

Tests.
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder that the code under test uses."""
    monkeypatch.setenv("KEXA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_wheel(tmp_path, monkeypatch):
    """``make_wheel(name, {path: content}) -> sha256``: a wheel that pip finds without an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def make(name: str, files: dict[str, str | bytes]) -> str:
        path = folder / f"{name}-1.0-py3-none-any.whl"
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as wheel:
            for inside, text in files.items():
                wheel.writestr(inside, text)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    return make


@pytest.fixture
def write_card(tmp_path):
    """``write_card(name, **front_matter) -> folder``."""
    folder = tmp_path / "cards"
    folder.mkdir()

    def write(name: str, **values: str):
        defaults = {
            "kind": "wheel",
            "package": name,
            "sha256": "f" * 64,
            "reader": "python_files",
            "origin": "human",
            "categories": "{code: 1}",
        }
        (folder / f"{name}.md").write_text(CARD.format(**{**defaults, **values}), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def server():
    """``server(answer) -> (url, requests)``; ``answer(body, number) -> (status, headers, reply)``.

    A reply that is a string becomes the content of a chat completion. Closed after the test.
    """
    servers = []

    def start(answer):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, dict(self.headers), body))
                status, headers, reply = answer(body, len(requests))
                if isinstance(reply, str):
                    choice = {"message": {"role": "assistant", "content": reply}}
                    reply = json.dumps({"choices": [choice | {"finish_reason": "stop"}]}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.handle_error = lambda *_: None  # a client that gave up is what some tests are about
        threading.Thread(target=http.serve_forever, daemon=True).start()
        servers.append(http)
        return f"http://127.0.0.1:{http.server_port}/v1", requests

    yield start
    for http in servers:
        http.shutdown()
        http.server_close()
