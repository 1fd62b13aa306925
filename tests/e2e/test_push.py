"""flora-train push against a hub on loopback with huggingface_hub's client, and with failures of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.cli import main
from tests.e2e.conftest import ROOT, Launch
from tests.forked import python
from tests.hub_server import ME, OTHERS, TOKEN, Hub, Repo, serve

ADAPTERS = sorted(f"{task}-{method}" for task in ("letters", "digits") for method in ("flora", "lora", "ia3"))
Push = Callable[..., "Said"]
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "flora_train_base.json"}


@pytest.fixture(scope="module")
def run(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "run"
    done = launch(f"recipe={recipe}", f"output_dir={folder}", "training.steps=2", "evaluation.interval=null")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@dataclass
class Said:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def push(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """The command, in this process: the client looks its constants up when it is called."""
    from huggingface_hub import constants

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    capfd.readouterr()

    def run(*words: str) -> Said:
        status = main(["push", *words])
        return Said(status, *capfd.readouterr())

    return run


def call(program: str, hub: Hub, home: Path) -> subprocess.CompletedProcess[str]:
    away = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HOME")
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    environment = {**{k: v for k, v in os.environ.items() if k not in away}, **ours}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_one_private_repository_in_one_commit_that_plain_peft_loads(
    run: Path, checkpoint: Path, hub: Hub, tmp_path: Path, push: Push
) -> None:
    done = push(str(run), "--repo", "me/tiny")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/tiny"]
    assert repo.private
    assert len(repo.commits) == 1
    expected = {f"{name}/{file}" for name in ADAPTERS for file in FILES} | {
        "README.md",
        "report.html",
        "flora_train.json",
        ".gitattributes",
    }
    assert repo.files.keys() == expected
    for name in ADAPTERS:
        assert (
            repo.files[f"{name}/adapter_model.safetensors"]
            == (run / "adapters" / name / "adapter_model.safetensors").read_bytes()
        )
        assert (
            f'PeftModel.from_pretrained(base, "me/tiny", subfolder="{name}")'
            in repo.files[f"{name}/README.md"].decode()
        )
    program = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}), "me/tiny", \
                                  subfolder="digits-flora")
print(model.peft_config["default"].peft_type.value)
"""
    loaded = call(program, hub, tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "HIRA"
    again = push(str(run), "--repo", "me/tiny")
    assert again.returncode == 0, again.stderr
    assert len(repo.commits) == 1  # nothing to send


def test_a_push_that_breaks_off_is_finished_by_another(run: Path, hub: Hub, push: Push) -> None:
    hub.faults = [["PUT", "/lfs/", 403, 99]]
    broken = push(str(run), "--repo", "me/tiny")
    assert broken.returncode == 2
    assert "adapter_model.safetensors' to the Hub.); uploaded files stay: push again" in broken.stderr
    assert hub.repos["me/tiny"].commits == []
    hub.faults = []
    sent = len(hub.lfs)
    done = push(str(run), "--repo", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert len(hub.lfs) == len(ADAPTERS) >= sent
    assert len(hub.repos["me/tiny"].commits) == 1


@pytest.mark.parametrize(
    "fault",
    [
        ["POST", "/commit/", 503, 1],
        ["POST", "/api/repos/create", 429, 2],
        ["POST", "/commit/", "drop", 1],
        ["PUT", "/lfs/", 503, 1],
    ],
    ids=["503", "429", "dropped", "LFS 503"],
)
def test_a_hub_that_is_busy_is_asked_again(run: Path, hub: Hub, push: Push, fault: list[object]) -> None:
    hub.faults = [list(fault)]
    done = push(str(run), "digits-flora", "--repo", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert hub.faults[0][3] == 0
    assert len(hub.repos["me/tiny"].commits) == 1
    assert "digits-flora/adapter_model.safetensors" in hub.repos["me/tiny"].files


def test_a_repository_for_each_and_a_collection(run: Path, hub: Hub, push: Push) -> None:
    words = [
        str(run),
        "digits-flora",
        "letters-ia3",
        "--repo",
        "me/tiny",
        "--repo-per-adapter",
        "--public",
        "--base",
        "org/base",
    ]
    for _ in range(2):
        done = push(*words)
        assert done.returncode == 0, done.stderr
    assert hub.repos.keys() == {"me/tiny-digits-flora", "me/tiny-letters-ia3"}
    for name, repo in hub.repos.items():
        assert not repo.private
        assert len(repo.commits) == 1
        assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
        assert "flora_train_base.json" not in repo.files  # it names the weights of the other base model
        assert f'PeftModel.from_pretrained(base, "{name}")' in repo.files["README.md"].decode()
        assert "base_model: org/base" in repo.files["README.md"].decode()
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == list(hub.repos)


def test_dry_run_sends_nothing_and_lists_everything(run: Path, hub: Hub, push: Push) -> None:
    done = push(str(run), "--dry-run", "--repo", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert hub.asked == []
    assert done.stdout.startswith("me/tiny  private, ")
    assert done.stdout.count("adapter_model.safetensors") == len(ADAPTERS)


def test_push_keeps_adapters_of_other_runs_and_unknown_files(run: Path, hub: Hub, push: Push) -> None:
    assert push(str(run), "digits-flora", "--repo", "me/tiny").returncode == 0
    repo = hub.repos["me/tiny"]
    assert push(str(run), "digits-lora", "--repo", "me/tiny").returncode == 0
    assert set(json.loads(repo.files["flora_train.json"])["adapters"]) == {"digits-flora", "digits-lora"}
    table = repo.files["README.md"].decode()
    assert "2 adapters for" in table
    assert all(f"| [{name}]({name}) | digits |" in table for name in ("digits-flora", "digits-lora"))
    told = json.loads(repo.files["flora_train.json"])["adapters"]
    repo.files["flora_train.json"] = json.dumps(
        {"adapters": {"digits-flora": told["digits-flora"] | {"run": "another"}}}
    ).encode()
    clash = push(str(run), "digits-flora", "--repo", "me/tiny")
    assert clash.returncode == 2
    assert "repo = 'me/tiny': has an adapter digits-flora of another run" in clash.stderr
    elsewhere = push(str(run), "digits-ia3", "--repo", "me/tiny", "--base", "org/base")
    assert elsewhere.returncode == 2
    assert "repo = 'me/tiny': holds adapters for another base, " in elsewhere.stderr
    repo.files["flora_train.json"] = b'{"adapters": {"digits-flora": "as it once was"}}'
    older = push(str(run), "digits-flora", "--repo", "me/tiny")
    assert older.returncode == 2
    assert "repo = 'me/tiny': has a flora_train.json of another version" in older.stderr
    hub.repos["me/novel"] = Repo(True, {"chapter.txt": b"Once"})
    other = push(str(run), "--repo", "me/novel")
    assert other.returncode == 2
    assert "repo = 'me/novel': exists, and holds something else (chapter.txt)" in other.stderr
    assert hub.repos["me/novel"].commits == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--repo", f"{OTHERS}/tiny"], f"repo = '{OTHERS}/tiny': is not writable for user {ME}"),
        (["digits-flra", "--repo", "me/tiny"], "adapter = 'digits-flra': there are "),
        (["--repo", "tiny"], "repo = 'tiny': "),
        ([], "repo: "),
    ],
)
def test_bad_input_is_one_clear_error(run: Path, hub: Hub, push: Push, words: list[str], line: str) -> None:
    done = push(str(run), *words)
    assert done.returncode == 2
    assert line in done.stderr
    assert not any(repo.commits for repo in hub.repos.values())


def check_refused_user(done: Said | subprocess.CompletedProcess[str], hub: Hub, line: str) -> None:
    assert done.returncode == 2, done.stderr
    assert line in done.stderr
    assert "use the folders as they are: plain peft loads them" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("token", "line"),
    [
        ("hf_wrong", "the hub rejects your token: run hf auth login"),
        ("", "requires a login: hf auth login, or HF_TOKEN=..."),
    ],
)
def test_refused_user_learns_how_to_log_in(
    run: Path, hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch, token: str, line: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    check_refused_user(push(str(run), "--repo", "me/tiny"), hub, line)


def test_offline_push_says_how_to_go_online(run: Path, hub: Hub) -> None:
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
    done = python("-m", "flora_train", "push", str(run), "--repo", "me/tiny", environment=environment)
    check_refused_user(done, hub, "cannot be reached, HF_HUB_OFFLINE=1 forbids it")


def test_a_run_that_trains_still_is_refused(run: Path, hub: Hub, push: Push) -> None:
    state = run / "run.json"
    before = state.read_text()
    state.write_text(json.dumps({**json.loads(before), "finished": False}))
    try:
        done = push(str(run), "--repo", "me/tiny")
    finally:
        state.write_text(before)
    assert done.returncode == 2
    assert "is not finished: it is still training, or can be resumed with resume=true" in done.stderr


def test_an_existing_public_repository_is_not_filled_unless_public_is_given(
    run: Path, hub: Hub, push: Push
) -> None:
    hub.repos["me/tiny"] = Repo(False, {".gitattributes": b""})
    done = push(str(run), "digits-flora", "--repo", "me/tiny")
    assert done.returncode == 2
    assert "repo = 'me/tiny': exists and is public: give --public" in done.stderr
    assert hub.repos["me/tiny"].commits == []
    done = push(str(run), "digits-flora", "--repo", "me/tiny", "--public")
    assert done.returncode == 0, done.stderr
    assert len(hub.repos["me/tiny"].commits) == 1


def test_existing_private_repository_stays_private_with_a_warning(run: Path, hub: Hub, push: Push) -> None:
    hub.repos["me/tiny"] = Repo(True, {".gitattributes": b""})
    done = push(str(run), "digits-flora", "--repo", "me/tiny", "--public")
    assert done.returncode == 0, done.stderr
    assert "me/tiny exists and stays private" in done.stderr


def test_one_public_repository_of_several_is_found_before_anything_is_sent(
    run: Path, hub: Hub, push: Push
) -> None:
    hub.repos["me/tiny-letters-ia3"] = Repo(False, {".gitattributes": b""})
    done = push(str(run), "--repo", "me/tiny", "--repo-per-adapter")
    assert done.returncode == 2
    assert "me/tiny-letters-ia3': exists and is public" in done.stderr
    assert list(hub.repos) == ["me/tiny-letters-ia3"]
    assert hub.collections == {}


@pytest.mark.parametrize(
    "wait",
    ["99999999999", "3153600000", "Fri, 31 Dec 9999 23:59:59 GMT", "inf", "nan", "-5", "soon", "9" * 400],
)
def test_wait_requested_by_the_hub_is_bounded(
    run: Path, hub: Hub, push: Push, monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    answer = (429, {"error": "slow down"}, {"Retry-After": wait})
    hub.faults = [
        ["POST", "/api/repos/create", answer, 1],
        ["POST", "/commit/", answer, 1],
        ["PUT", "/lfs/", answer, 1],
    ]
    done = push(str(run), "digits-flora", "--repo", "me/tiny")
    assert done.returncode == 0, done.stderr
    assert [fault[3] for fault in hub.faults] == [0, 0, 0]
    assert all(0 <= seconds <= 61 for seconds in waited), waited
    assert "trying again in" in done.stderr


NONSENSE = [
    b"<html>",
    b"",
    b"[]",
    b"3",
    b"null",
    b"{}",
    b"\xff\xfe",
    b'{"name": []}',
    b"[" * 5000,
    b'{"adapters": 3}',
    b'{"siblings": 3}',
]
ASKED = [
    "/api/whoami-v2",
    "/api/models/me/tiny",
    "/api/repos/create",
    "/preupload/",
    "/commit/",
    "objects/batch",
    "/resolve/",
    "/api/collections",
]


@pytest.mark.attack
@given(
    asked=st.sampled_from(ASKED),
    status=st.sampled_from([200, 200, 200, 400, 404, 418, 500]),
    content=st.sampled_from(NONSENSE),
)
def test_a_hub_that_answers_nonsense_is_one_line(
    run: Path, hub: Hub, push: Push, asked: str, status: int, content: bytes
) -> None:
    words = [
        str(run),
        "digits-flora",
        "--repo",
        "me/tiny",
        *(["--repo-per-adapter"] if "collections" in asked else []),
    ]
    hub.repos.clear()
    hub.collections.clear()
    if "resolve" in asked:
        hub.repos["me/tiny"] = Repo(True, {"flora_train.json": b"{}"})
    hub.faults = [[method, asked, (status, content), 99] for method in ("GET", "POST", "HEAD")]
    done = push(*words)
    hub.faults = []
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr
    assert (
        done.returncode == 0
        or len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    )


@pytest.mark.parametrize(
    "name",
    [
        "me/a--b",
        "me/a..b",
        "me/-a",
        "me/a-",
        "me/.a",
        "me/a.",
        "me/a b",
        "me/" + "a" * 97,
        "me/é",
        "me/a.git",
        "me--x/a",
        "a/b/c",
    ],
)
def test_a_name_that_the_hub_refuses_is_refused_before_anything_is_asked(
    run: Path, hub: Hub, push: Push, name: str
) -> None:
    for words in (["--repo", name], ["--repo", name, "--repo-per-adapter"], ["--repo", name, "--dry-run"]):
        done = push(str(run), *words)
        assert done.returncode == 2
        assert done.stderr.count("the hub refuses this name") == 1
    long = push(str(run), "--repo", "me/" + "a" * 90, "--repo-per-adapter")
    assert "repo_per_adapter: " in long.stderr
    assert "characters; at most 96 are allowed" in long.stderr
    assert hub.asked == []


def test_only_the_adapter_s_own_files_are_pushed(run: Path, hub: Hub, push: Push) -> None:
    notes = run / "adapters" / "digits-flora" / "secret.txt"
    notes.write_text("mine")
    try:
        assert push(str(run), "digits-flora", "--repo", "me/tiny").returncode == 0
    finally:
        notes.unlink()
    assert not any("secret" in path for path in hub.repos["me/tiny"].files)
