"""API keys as clients on a whole server: told to the scheduler, forged by nobody, and never shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from flora_train.serving.client_identity import key_hash
from flora_train.serving.fairness import VARIABLE
from tests.serving.server import SMALL, VLLM, Server, free_port
from tests.serving.tiny import Exported

ALICE, BOB = "sk-alice-0123456789", "sk-bob-9876543210"
ADAPTER = "tenant"
BASE = "tiny"


@dataclass
class Recorded:
    server: Server
    file: Path
    seen: int = 0

    def send(
        self, path: str, content: dict[str, Any], key: str | None, headers: dict[str, str] | None = None
    ) -> tuple[int, str, list[dict[str, Any]]]:
        """Status, response (headers and body), and what the scheduler got because of it."""
        everything = {"Content-Type": "application/json", **(headers or {})}
        if key is not None:
            everything["Authorization"] = f"Bearer {key}"
        request = Request(
            f"http://127.0.0.1:{self.server.port}{path}", json.dumps(content).encode(), headers=everything
        )
        try:
            with urlopen(request, timeout=120) as answer:
                status, text = answer.status, str(answer.headers) + answer.read().decode()
        except HTTPError as error:
            status, text = error.code, str(error.headers) + error.read().decode()
        lines = []
        if self.file.exists():
            lines = [json.loads(line) for line in self.file.read_text().splitlines()]
        new, self.seen = lines[self.seen :], len(lines)
        return status, text, new

    def completion(self, key: str, model: str = BASE, **more: Any) -> list[dict[str, Any]]:
        headers = more.pop("headers", None)
        content = {"model": model, "prompt": "abc", "max_tokens": 2, **more}
        status, text, records = self.send("/v1/completions", content, key, headers)
        assert status == 200, text
        assert ALICE not in text
        assert BOB not in text
        assert "fair-" not in text or "fair-" in json.dumps([content, headers])
        return records


@pytest.fixture(scope="module")
def recorded(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("clients")
    port = free_port()
    words = [
        *VLLM, str(exported.base), *SMALL, "--port", str(port), "--served-model-name", BASE,
        "--enable-lora", "--lora-modules", f"{ADAPTER}={exported.folders[exported.lora]}",
        "--enable-log-requests", "--enable-request-id-headers",
        "--scheduler-cls", "tests.serving.recording.RecordingScheduler",
        "--middleware", "flora_train.serving.client_middleware.ClientMiddleware",
        "--api-key", ALICE, BOB, "--chat-template", "{{ messages[0].content }}",
        "--api-server-count", "2",
    ]  # fmt: skip
    settings = json.dumps({"key_weights": {key_hash(ALICE): 3}})
    from tests.serving.recording import FILE

    environment = {FILE: str(folder / "record"), "VLLM_LOGGING_LEVEL": "INFO", VARIABLE: settings}
    server = Server(words, port, folder / "log", environment)
    try:
        yield Recorded(server.wait_until_ready(), folder / "record")
    finally:
        server.stop()


def test_each_key_is_a_client_whatever_its_adapter(recorded: Recorded) -> None:
    [first] = recorded.completion(ALICE)
    [second] = recorded.completion(ALICE, ADAPTER)
    [other] = recorded.completion(BOB)
    assert first["client"] == second["client"]
    assert first["client"].startswith("key:")
    assert other["client"].startswith("key:")
    assert other["client"] != first["client"]


def test_keys_have_their_weights(recorded: Recorded) -> None:
    assert recorded.completion(ALICE)[0]["weight"] == 3
    assert recorded.completion(BOB)[0]["weight"] == 1


def test_all_api_servers_name_the_same_client(recorded: Recorded) -> None:
    records = []
    for _ in range(10):
        # The system chooses the server that a connection goes to: the idle one, if the other is busy.
        with ThreadPoolExecutor(8) as pool:
            for new in pool.map(lambda _: recorded.completion(ALICE, max_tokens=8), range(8)):
                records += new
        if len({record["server"] for record in records}) == 2:
            break
    records += recorded.completion(ALICE)  # also what was recorded between two readings
    assert len({record["server"] for record in records}) == 2
    assert len({record["client"] for record in records}) == 1


def test_all_ways_in_name_the_client(recorded: Recorded) -> None:
    [own] = recorded.completion(ALICE)
    samples = recorded.completion(ALICE, n=3, temperature=1.0)
    assert [record["client"] for record in samples] == [own["client"]] * 3
    two_prompts = recorded.completion(ALICE, prompt=["abc", "def"])
    assert [record["client"] for record in two_prompts] == [own["client"]] * 2
    streamed = recorded.completion(ALICE, stream=True)
    assert [record["client"] for record in streamed] == [own["client"]]
    content = {"model": BASE, "input": "abc", "max_output_tokens": 4}
    status, text, records = recorded.send("/v1/responses", content, ALICE)
    assert status == 200, text
    assert [record["client"] for record in records] == [own["client"]]
    chat = {"model": BASE, "messages": [{"role": "user", "content": "abc"}], "max_tokens": 2}
    status, text, records = recorded.send("/v1/chat/completions", chat, ALICE)
    assert status == 200, text
    assert [record["client"] for record in records] == [own["client"]]


def test_nobody_can_name_another_client(recorded: Recorded) -> None:
    [alice] = recorded.completion(ALICE)
    [bob] = recorded.completion(BOB)
    forged = [alice["id"], alice["id"].split("cmpl")[0], "fair-" + "0" * 32 + "-" + "0" * 16 + "-"]
    for name in forged:
        [by_header] = recorded.completion(BOB, headers={"X-Request-Id": name})
        assert by_header["client"] == bob["client"]
        [by_body] = recorded.completion(BOB, request_id=name)
        assert by_body["client"] == bob["client"]
        content = {"model": BASE, "input": "abc", "max_output_tokens": 4, "request_id": name}
        status, text, records = recorded.send("/v1/responses", content, BOB)
        assert status == 200, text
        assert [record["client"] for record in records] == [bob["client"]]


def test_a_wrong_or_missing_key_is_refused_as_before(recorded: Recorded) -> None:
    for key in (None, "sk-wrong", ALICE[:-1], ""):
        status, _, records = recorded.send("/v1/completions", {"model": BASE, "prompt": "abc"}, key)
        assert status == 401
        assert not records


def test_no_key_is_in_request_ids_or_in_the_log_of_requests(recorded: Recorded) -> None:
    recorded.completion(ALICE)
    recorded.completion(BOB, ADAPTER)
    record = recorded.file.read_text()
    assert "Added request fair-" in recorded.server.output
    # vLLM itself prints its arguments, once, when it starts
    lines = [line for line in recorded.server.output.splitlines() if "non-default args" not in line]
    for key in (ALICE, BOB):
        assert key not in record
        assert key not in "\n".join(lines)
