"""Serving many adapters: every answer is its adapter's, and what the server says of wrong requests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from .conftest import EXAMPLES, SERVE, Run, table

httpx = pytest.importorskip("httpx")


@pytest.mark.slow
def test_serving_answers_every_request_with_its_adapter(runs: Callable[[str], Run]) -> None:
    _, output = runs("serve_adapters.py")
    rows = table(output)
    assert list(rows) == ["base alone", "1 adapter", "5 adapters", "the same, changing"]
    for requests, *_, errors in rows.values():
        assert int(requests) > 0
        assert errors == "0"
    assert int(rows["the same, changing"][-2]) > 0
    equal = re.search(r"^(\d+) of (\d+) answers", output, re.M)
    assert equal is not None
    assert equal[1] == equal[2] != "0"


class Tags(HTMLParser):
    """Which elements are open; every end has to be that of the innermost one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {name for name, _ in attrs} & {"src", "href"}  # nothing is fetched from elsewhere
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Callable[..., Any], Any]]:
    """A server of a small model with two random adapters, as a process: a function for requests, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [*SERVE, "--random", "2", "--port", str(port), "--max-tokens", "40", "--adapters", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, EXAMPLES / "serve_adapters.py", *arguments], env=environment)

    def ask(method: str, path: str, **body: Any) -> Any:
        return httpx.request(method, f"http://127.0.0.1:{port}{path}", json=body or None, timeout=60)

    try:
        for _ in range(600):
            with contextlib.suppress(httpx.ConnectError):
                ask("GET", "/stats")
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield ask, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_server_says_what_is_wrong_and_stops_when_asked(server: tuple[Callable[..., Any], Any]) -> None:
    ask, process = server

    def refused(status: int, message: str, method: str, path: str, **body: Any) -> None:
        response = ask(method, path, **body)
        assert response.status_code == status
        assert message in str(response.json()["detail"])

    refused(
        404, "no adapter 'random-9'; there are 2 (near it: random-", "POST", "/generate", adapter="random-9", prompt="a"
    )
    refused(404, "no adapter 'x'", "DELETE", "/adapters/x")
    refused(404, "no adapter 'x'", "PUT", "/adapters/x", seed=1)
    refused(400, "adapter 'random-0' is there already", "POST", "/adapters", name="random-0")
    refused(400, "outside the folder of adapters", "POST", "/adapters", name="x", file="../x.safetensors")
    refused(404, "none.safetensors", "POST", "/adapters", name="x", file="none.safetensors")
    refused(400, "together 44: expected at most 40", "POST", "/generate", prompt=[1, 2, 3, 4], new_tokens=40)
    refused(400, "prompt has the token 384, expected tokens from 0 to 383", "POST", "/generate", prompt=[5, 384])
    refused(422, "prompt", "POST", "/generate", prompt="")

    asked = {"prompt": "once upon", "new_tokens": 12}
    answers = [ask("POST", "/generate", adapter=name, **asked).json() for name in (None, "random-0", "random-1")]
    assert len({tuple(answer["tokens"]) for answer in answers}) == 3
    assert ask("PUT", "/adapters/random-0", seed=1).status_code == 200
    assert ask("POST", "/generate", adapter="random-0", **asked).json()["tokens"] == answers[2]["tokens"]
    assert ask("DELETE", "/adapters/random-1").json() == {"removed": "random-1"}
    assert ask("GET", "/adapters").json() == {"adapters": ["random-0"]}
    stats = ask("GET", "/stats").json()
    assert (stats["finished"], stats["failed"], stats["running"], stats["adapters"]) == (4, 0, 0, 1)

    page = ask("GET", "/").text
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert "http" not in page
    shown = re.findall(r"^  (\w+): \"", page, re.M)
    assert shown == list(stats)

    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, -signal.SIGINT)
