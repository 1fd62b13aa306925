"""The headline recipes without hub, token or GPU: one quick answer with all that is missing, no download."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flora_train.config.load import load_config, save_config
from tests.forked import ROOT
from tests.hub_server import STRANGER, TOKEN, Fault, Hub, serve

SECONDS = 20
"""Far more than an answer takes on an idle machine; the client's own retries wait for 23 s."""
LANGUAGES = ("d", "julia", "lua", "perl", "r", "racket", "ruby", "rust", "swift")
PROGRAM = """
import sys
from flora_train.cli import main
status = main(sys.argv[1:])
print("torch was loaded" if "torch" in sys.modules else "torch was not loaded")
sys.exit(status)
"""
CHECK = """
import sys
from flora_train.config.load import load_config
from flora_train.prerequisites import check_prerequisites
from flora_train.runtime.logging import init_logging
init_logging()
check_prerequisites(load_config(sys.argv[1:]))
print("complete")
"""


def environment(folder: Path, endpoint: str, **more: str) -> dict[str, str]:
    """A user's environment without login and cache. A hub on a busy machine is slow to answer, and is waited
    for."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and "PROXY" not in name.upper()
    }
    ours = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "XDG_CACHE_HOME": str(folder / "cache")}
    ours |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "30"}
    return kept | ours | more


def ask(program: str, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def refusal(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of an answer that refuses, without the first one, which names the run."""
    assert done.returncode == 2, done.stderr
    assert "torch was not loaded" in done.stdout
    assert "Retry" not in done.stderr
    assert "thrown" not in done.stderr
    lines = done.stderr.splitlines()[1:]
    assert len(lines) == len(set(lines))
    return lines


def write_safetensors(file: Path, parameters: int) -> None:
    """A weight file whose header lists this many bfloat16 values; they are a hole in the file."""
    size = 2 * parameters
    header = json.dumps({"w": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, size]}}).encode()
    with file.open("wb") as content:
        content.write(struct.pack("<Q", len(header)) + header)
        content.truncate(content.tell() + size)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with the repositories of recipe=multipl_e, in which the model is tiny."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    write_safetensors(model / "model.safetensors", 1000)
    for name in ("README.md", *(f"data/{language}/a.parquet" for language in LANGUAGES)):
        file = tmp_path / "rows" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"rows")
    with serve() as hub:
        hub.add_folder("bigcode/starcoder", model, gated=True)
        hub.add_folder("bigcode/the-stack-dedup", tmp_path / "rows", "dataset", gated=True)
        hub.add_folder("nuprl/MultiPL-E", tmp_path / "rows", "dataset")
        yield hub


@contextmanager
def silent_server() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection, _ in connections:
            connection.close()


@contextmanager
def closed_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextmanager
def unknown_name() -> Iterator[str]:
    yield "http://no-such-host.invalid"


@pytest.mark.parametrize("unreachable", [closed_port, silent_server, unknown_name])
@pytest.mark.parametrize(
    ("recipe", "needed", "instead"),
    [
        ("multipl_e", "bigcode/the-stack-dedup (tasks.d.train.hub and 8 more)", "recipe=multipl_e_local"),
        ("common_voice", "openai/whisper-large (model.path)", "recipe=speech_local"),
    ],
)
def test_without_network_everything_that_is_missing_is_said_at_once(
    unreachable: object, recipe: str, needed: str, instead: str, tmp_path: Path
) -> None:
    with unreachable() as endpoint:  # type: ignore[operator]
        started = time.monotonic()
        env = environment(tmp_path, endpoint)
        del env["HF_HUB_ETAG_TIMEOUT"]
        done = ask(PROGRAM, "train", f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", env=env)
        assert time.monotonic() - started < SECONDS
    network, *others, last = refusal(done)
    assert network.startswith("error: network: ")
    assert "cannot be reached" in network
    assert needed in network
    assert "HF_ENDPOINT" in network
    assert any(line.startswith("error: GPU: ") and "an estimate" in line for line in others)
    if recipe == "multipl_e":
        assert any(line.startswith("error: login: ") for line in others)
        assert any(line.startswith("error: memory: bigcode/starcoder has 15.5 billion") for line in others)
    else:
        assert any(
            line.startswith("error: tasks.ar.train.common_voice = 'data/cv-corpus'") for line in others
        )
    assert last.startswith("what runs here instead: ")
    assert instead in last
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("", "error: login: bigcode/starcoder (model.path) and bigcode/the-stack-dedup"),
        ("hf_wrong", "error: login: the token of this machine is refused"),
        (
            STRANGER,
            "error: terms: this token may not read bigcode/starcoder (model.path) and bigcode/the-stack",
        ),
    ],
)
def test_login_and_terms_are_told_apart(token: str, expected: str, hub: Hub, tmp_path: Path) -> None:
    done = ask(PROGRAM, "train", "recipe=multipl_e", env=environment(tmp_path, hub.url, HF_TOKEN=token))
    line, *_, instead = refusal(done)
    assert line.startswith(expected)
    if token != "hf_wrong":
        assert f"{hub.url}/datasets/bigcode/the-stack-dedup" in line
    assert "recipe=multipl_e_local" in instead


def test_with_token_and_a_tiny_model_the_check_is_silent(hub: Hub, tmp_path: Path) -> None:
    done = ask(CHECK, "recipe=multipl_e", env=environment(tmp_path, hub.url, HF_TOKEN=TOKEN))
    assert (done.stdout, done.stderr) == ("complete\n", "")
    assert not any("resolve" in path and method == "GET" for method, path in hub.asked)
    assert not (tmp_path / "hf" / "hub").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["model.path=bigcode/starcodr"],
            "error: model.path = 'bigcode/starcodr': there is no such model on",
        ),
        (["model.revision=v9"], "error: model.revision = 'v9': bigcode/starcoder has no such branch"),
        (
            ["tasks.lua.train.hub=bigcode/stack"],
            "error: tasks.lua.train.hub = 'bigcode/stack': there is no such data set on",
        ),
        (
            ["evaluation.problems=hub:nuprl/MultiPLE"],
            "error: evaluation.problems = 'hub:nuprl/MultiPLE': there is no such data set on",
        ),
    ],
)
def test_wrong_names_and_revisions_are_named_with_their_key(
    words: list[str], expected: str, hub: Hub, tmp_path: Path
) -> None:
    env = environment(tmp_path, hub.url, HF_TOKEN=TOKEN)
    line = refusal(ask(PROGRAM, "train", "recipe=multipl_e", *words, env=env))[0]
    assert line.startswith(expected)


def test_a_busy_hub_is_noted_and_left_to_the_client(hub: Hub, tmp_path: Path) -> None:
    hub.add_faults(Fault("503", "/api/datasets/*", times=9))
    done = ask(CHECK, "recipe=multipl_e", env=environment(tmp_path, hub.url, HF_TOKEN=TOKEN))
    assert done.stdout == "complete\n"
    assert (
        done.stderr == "note: the hub is slow or busy (answered 503): requests are repeated for some time\n"
    )


def test_what_is_no_hub_is_said(tmp_path: Path) -> None:
    page = (200, b"<html>log in to this network</html>", {"Content-Type": "text/html"})
    with serve() as portal:
        portal.faults.append(["GET", "", page, 99])
        done = ask(PROGRAM, "train", "recipe=multipl_e", env=environment(tmp_path, portal.url))
    assert "does not answer as the hub" in refusal(done)[0]


@contextmanager
def file_server() -> Iterator[str]:
    """Another web server, which has no such files and answers without the hub's headers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, format: str, *values: object) -> None:
        """Without lines in the output of the tests."""


def test_a_server_that_is_no_hub_is_taken_for_a_wrong_address(tmp_path: Path) -> None:
    with file_server() as url:
        env = environment(tmp_path, url)
        several = refusal(ask(PROGRAM, "train", "recipe=multipl_e", env=env))
        words = ["model.path=me/base", "training.allow_slow=true"]
        one = refusal(ask(PROGRAM, "train", "recipe=quickstart", *words, env=env))
        plan = ask(PROGRAM, "plan", "recipe=quickstart", "model.path=me/base", env=env)
    assert several[0].startswith(f"error: network: {url.removeprefix('http://')} does not answer as the hub")
    assert "correct HF_ENDPOINT" in several[0]
    assert not [line for line in several if "there is no such" in line]
    assert one[0].startswith("error: model.path = 'me/base': there is no such model on ")
    assert "check the name, and HF_ENDPOINT (it answers 404, and not as a hub does)" in one[0]
    assert "answers 404, and not as a hub: check the name of the model, and HF_ENDPOINT" in plan.stderr


def test_a_proxy_is_used_and_named_without_its_password(tmp_path: Path) -> None:
    with closed_port() as proxy:
        address = proxy.replace("http://", "http://user:secret@")
        env = environment(tmp_path, "https://huggingface.co", HTTPS_PROXY=address)
        network = refusal(ask(PROGRAM, "train", "recipe=multipl_e", env=env))[0]
    assert f"through the proxy {proxy} (" in network
    assert "secret" not in network


def test_the_path_of_a_mirror_is_part_of_its_address(hub: Hub, tmp_path: Path) -> None:
    env = environment(tmp_path, f"{hub.url}/mirror/hf", HF_TOKEN=TOKEN)
    lines = refusal(ask(PROGRAM, "train", "recipe=multipl_e", env=env))
    host = hub.url.removeprefix("http://")
    assert lines[0].startswith(
        f"error: network: {host}/mirror/hf does not answer as the hub: it answers 404 "
    )
    assert {path for _, path in hub.asked} >= {"/mirror/hf/api/models/bigcode/starcoder"}
    assert all(path.startswith("/mirror/hf/") for _, path in hub.asked)


def test_the_token_is_not_sent_to_another_server(hub: Hub, tmp_path: Path) -> None:
    with serve() as other:
        away = (302, b"", {"Location": f"{other.url}/api/models/bigcode/starcoder"})
        hub.faults.append(["GET", "/api/models/bigcode/starcoder", away, 9])
        ask(CHECK, "recipe=multipl_e", env=environment(tmp_path, hub.url, HF_TOKEN=TOKEN))
        assert other.asked == []


def test_a_large_base_is_refused_with_its_size(hub: Hub, tmp_path: Path) -> None:
    files = [{"rfilename": "config.json"}, {"rfilename": "model.safetensors", "size": 800 * 10**9}]
    information = {"id": "bigcode/starcoder", "siblings": files, "safetensors": {"total": 400 * 10**9}}
    answer = (200, json.dumps(information).encode(), {})
    hub.faults.append(["GET", "/api/models/bigcode/starcoder", answer, 1])
    env = environment(tmp_path, hub.url, HF_TOKEN=TOKEN)
    done = ask(PROGRAM, "train", "recipe=multipl_e", "model.dtype=bfloat16", env=env)
    memory, *_, disk, instead = refusal(done)
    assert memory.startswith(
        "error: memory: bigcode/starcoder has 400.0 billion parameters, which need 800.0"
    )
    assert "model.path=bigcode/starcoder" in memory
    assert disk.startswith("error: disk: 800.0 GB would be downloaded into ")
    assert "recipe=multipl_e_local" in instead


def test_years_on_a_cpu_need_allow_slow(hub: Hub, tmp_path: Path) -> None:
    env = environment(tmp_path, hub.url, HF_TOKEN=TOKEN, ACCELERATE_USE_CPU="true")
    words = ["recipe=multipl_e", "training.steps=1000000", "training.tokens_per_step=10000000"]
    write_safetensors(tmp_path / "model" / "model.safetensors", 10**6)
    line, _ = refusal(ask(PROGRAM, "train", *words, env=env))
    assert line.startswith("error: GPU: ACCELERATE_USE_CPU is set, and training on ")
    assert "training.allow_slow=true" in line
    assert ask(CHECK, *words, "training.allow_slow=true", env=env).stdout == "complete\n"


def test_offline_says_what_the_cache_lacks(hub: Hub, tmp_path: Path) -> None:
    env = environment(tmp_path, hub.url, HF_TOKEN=TOKEN)
    download = "from huggingface_hub import snapshot_download; snapshot_download('bigcode/starcoder')"
    assert ask(download, env=env).returncode == 0
    asked = len(hub.asked)
    done = ask(PROGRAM, "train", "recipe=multipl_e", env=env | {"HF_HUB_OFFLINE": "1"})
    cached, problems, rows, instead = refusal(done)
    assert cached == "note: in the hub's cache: bigcode/starcoder"
    assert problems.startswith("error: evaluation.problems = 'hub:nuprl/MultiPL-E': is not in the local")
    assert rows.startswith("error: tasks.d.train.hub = 'bigcode/the-stack-dedup': data/d/ of it is not in")
    assert "recipe=multipl_e_local" in instead
    assert len(hub.asked) == asked


def test_without_network_a_complete_cache_suffices(hub: Hub, tmp_path: Path) -> None:
    env = environment(tmp_path, hub.url, HF_TOKEN=TOKEN)
    download = (
        "from huggingface_hub import snapshot_download; snapshot_download('bigcode/starcoder');"
        "snapshot_download('nuprl/MultiPL-E', repo_type='dataset');"
        "snapshot_download('bigcode/the-stack-dedup', repo_type='dataset')"
    )
    assert ask(download, env=env).returncode == 0
    with closed_port() as endpoint:
        done = ask(CHECK, "recipe=multipl_e", env=env | {"HF_ENDPOINT": endpoint})
    assert done.stdout == "complete\n"
    assert "all that the run needs from it is in its cache" in done.stderr


def test_two_processes_answer_once(tmp_path: Path) -> None:
    with closed_port() as endpoint:
        env = environment(tmp_path, endpoint, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "launch/cpu_2proc.yaml",
        ]
        command = [*launcher, "train.py", "recipe=common_voice", f"output_dir={tmp_path / 'run'}"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: network: ") == 1
    assert done.stderr.count("what runs here instead: ") == 1
    assert "Retrying" not in done.stderr


@pytest.mark.parametrize("command", ["evaluate", "solve"])
def test_commands_on_a_run_check_the_hub_first(command: str, tmp_path: Path) -> None:
    save_config(load_config(["recipe=multipl_e"]), tmp_path / "config.yaml")
    with closed_port() as endpoint:
        done = ask(PROGRAM, command, str(tmp_path), env=environment(tmp_path, endpoint))
    assert done.returncode == 2
    assert done.stdout == "torch was not loaded\n"
    network, *others = done.stderr.splitlines()
    assert network.startswith("error: network: ")
    assert ("bigcode/the-stack-dedup" in network) == (command == "evaluate")
    assert not any(line.startswith("error: GPU: ") for line in others)


def test_doctor_lists_the_checks_as_its_rows(hub: Hub, tmp_path: Path) -> None:
    env = environment(tmp_path, hub.url, HF_TOKEN="")
    done = ask(PROGRAM, "doctor", "recipe=multipl_e", env=env)
    assert done.returncode == 2
    rows = done.stdout.splitlines()
    assert f"hub         {hub.url.removeprefix('http://')} answers" in rows
    assert "model       bigcode/starcoder (model.path): gated: needs a login" in rows
    assert "dataset     nuprl/MultiPL-E (evaluation.problems): can be read" in rows
    assert any(row.startswith("base size   the base needs 0.0 GB in ") for row in rows)
    assert done.stderr.startswith("error: login: bigcode/starcoder (model.path) and bigcode/the-stack-dedup")


def test_doctor_diagnoses_a_recipe_whose_rows_are_missing(checkpoint: Path, tmp_path: Path) -> None:
    with closed_port() as endpoint:
        env = environment(tmp_path, endpoint)
        words = ["recipe=multipl_e", f"model.path={checkpoint}"]
        done = ask(PROGRAM, "doctor", *words, env=env)
    assert done.returncode == 2
    assert "\nmissing     network: " in done.stdout
    assert "9 x ia3" in done.stdout
    assert done.stderr.startswith("error: recipe = 'multipl_e': lacks what the ")


def test_a_finished_run_is_shown_without_the_hub(tmp_path: Path) -> None:
    words = ["recipe=multipl_e", "resume=true", f"output_dir={tmp_path / 'run'}"]
    (tmp_path / "run").mkdir()
    data = dict.fromkeys(LANGUAGES)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"finished": True, "data": data}))
    with closed_port() as endpoint:
        env = environment(tmp_path, endpoint)
        assert ask(CHECK, *words, env=env).stdout == "complete\n"
        other = "adapters.ia3.tasks=[lua,php]"
        assert "network: " in ask(CHECK, *words, other, env=env).stderr


def test_a_tracker_that_is_online_needs_login_and_server(hub: Hub, tmp_path: Path) -> None:
    words = ["recipe=multipl_e", "tracking.trackers=[wandb]", "tracking.online=true"]
    env = environment(tmp_path, hub.url, HF_TOKEN=TOKEN, HOME=str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        env.pop(name, None)
    with closed_port() as server:
        login, network = refusal(ask(PROGRAM, "train", *words, env=env | {"WANDB_BASE_URL": server}))
    assert login.startswith("error: tracking.online = True: wandb has no login here: run `wandb login`")
    assert network.startswith(f"error: tracking.online = True: {server} cannot be reached (")
    ready = {"WANDB_BASE_URL": hub.url, "WANDB_API_KEY": "0" * 40}
    assert ask(CHECK, *words, env=env | ready).stdout == "complete\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "HF_ENDPOINT",
            "http://[::1",
            "error: HF_ENDPOINT = 'http://[::1': the hub's client cannot interpret",
        ),
        ("HF_HUB_ETAG_TIMEOUT", "soon", "error: HF_HUB_ETAG_TIMEOUT = 'soon': the hub's client cannot"),
        ("HF_TOKEN", "caf\u00e9", "error: login: the token of this machine is refused (it has characters"),
        ("HF_TOKEN_PATH", "/", "error: login: the token of this machine is refused (its file cannot be read"),
    ],
)
def test_settings_that_the_client_cannot_use_are_named(
    hub: Hub, tmp_path: Path, name: str, value: str, expected: str
) -> None:
    env = environment(tmp_path, hub.url) | {name: value}
    assert refusal(ask(PROGRAM, "train", "recipe=multipl_e", env=env))[0].startswith(expected)


def test_hundreds_of_missing_files_are_a_few_lines(hub: Hub, tmp_path: Path) -> None:
    rows = [f"tasks.t{number}.train=rows{number}.jsonl" for number in range(300)]
    env = environment(tmp_path, hub.url)
    lines = refusal(ask(PROGRAM, "train", "recipe=quickstart", "data_config=null", *rows, env=env))
    assert len(lines) < 15
    assert any("(and " in line and "more like it)" in line for line in lines)
