"""The tests' hub as a process of its own answers the real clients as the hub on the internet does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.forked import ROOT
from tests.hub_server import STRANGER, TOKEN, Fault, Hub, serve
from tests.unit.models.test_hub_files import folder  # noqa: F401 (a model in shards)

STACK, MODEL = "bigcode/the-stack-dedup", "bigcode/starcoder"
ROWS = 30


@pytest.fixture
def repositories(folder: Path, tmp_path: Path) -> Path:  # noqa: F811
    """FOLDER/models/ORG/NAME and FOLDER/datasets/ORG/NAME."""
    root = tmp_path / "repositories"
    (root / "models/bigcode").mkdir(parents=True)
    folder.rename(root / "models" / MODEL)
    stack = root / "datasets" / STACK
    for number in range(2):
        (stack / "data/lua").mkdir(parents=True, exist_ok=True)
        rows = [{"content": f"return {number}, {row}", "n": row} for row in range(ROWS)]
        pq.write_table(pa.Table.from_pylist(rows), stack / f"data/lua/train-{number:05d}-of-00002.parquet")
    (stack / "README.md").write_text("# The Stack\n")
    return root


@dataclass
class Process:
    """A hub that runs, and the environment of its clients."""

    url: str
    environment: dict[str, str]


@pytest.fixture
def process(repositories: Path, tmp_path: Path) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.hub_server", str(repositories), "--gated", MODEL]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        line = running.stdout.readline().removeprefix("export ").split()
        settings = dict(part.split("=", 1) for part in line)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {**inherited, **settings, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        try:
            yield Process(settings["HF_ENDPOINT"], environment)
        finally:
            running.send_signal(signal.SIGTERM)
    assert running.returncode == 0


def call(program: str, environment: dict[str, str]) -> Any:
    """What a program prints as JSON in its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CLIENTS = f"""
import json
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
api, stack, model = HfApi(), "{STACK}", "{MODEL}"
said = {{}}
information = api.model_info(model, files_metadata=True)
said["gated"] = information.gated
said["sizes"] = {{one.rfilename: one.size for one in information.siblings}}
tree = list(api.list_repo_tree(stack, repo_type="dataset", recursive=True))
said["tree"] = [one.path for one in tree]
asked = ["data/lua", "README.md", "no"]
said["paths"] = [one.path for one in api.get_paths_info(stack, asked, repo_type="dataset")]
said["branches"] = [one.name for one in api.list_repo_refs(stack, repo_type="dataset").branches]
commit = api.dataset_info(stack).sha
said["commits"] = [one.commit_id == commit for one in api.list_repo_commits(stack, repo_type="dataset")]
said["same commit"] = api.dataset_info(stack, revision=commit[:10]).sha == commit
folder = snapshot_download(model)
said["snapshot"] = folder.endswith(information.sha)
with HfFileSystem().open(f"datasets/{{stack}}/data/lua/train-00000-of-00002.parquet") as file:
    file.seek(-4, 2)
    said["end of a shard"] = file.read().decode()
import datasets
options = {{"data_dir": "data/lua", "split": "train"}}
said["streamed"] = len(list(datasets.load_dataset(stack, streaming=True, **options)))
said["loaded"] = len(datasets.load_dataset(stack, **options))
from transformers import AutoModelForCausalLM, AutoTokenizer
said["parameters"] = AutoModelForCausalLM.from_pretrained(model).num_parameters()
said["tokens"] = AutoTokenizer.from_pretrained(model)("ab")["input_ids"]
print(json.dumps(said))
"""


def test_huggingface_hub_datasets_and_transformers_read_from_the_process(
    process: Process, repositories: Path
) -> None:
    said = call(CLIENTS, process.environment)
    shards = [f"data/lua/train-{number:05d}-of-00002.parquet" for number in range(2)]
    model = repositories / "models" / MODEL
    assert said["gated"] == "auto"
    assert said["sizes"] == {path.name: path.stat().st_size for path in model.iterdir()}
    assert said["tree"] == ["README.md", "data", "data/lua", *shards]
    assert said["paths"] == ["data/lua", "README.md"]
    assert said["branches"] == ["main"]
    assert said["commits"] == [True]
    assert said["same commit"]
    assert said["snapshot"]
    assert said["end of a shard"] == "PAR1"
    assert said["streamed"] == said["loaded"] == 2 * ROWS
    assert said["parameters"] > 10_000
    assert len(said["tokens"]) == 2


PUSH = """
import json
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("me/adapter", private=True)
files = {"adapter_config.json": "{}", "adapter_model.safetensors": "tensors"}
for name, content in files.items():
    api.upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id="me/adapter")
print(json.dumps([open(api.hf_hub_download("me/adapter", name)).read() for name in files]))
"""


def test_what_is_pushed_to_the_process_is_read_from_it(process: Process) -> None:
    assert call(PUSH, process.environment) == ["{}", "tensors"]


@pytest.fixture
def hub(repositories: Path) -> Iterator[Hub]:
    with serve() as hub:
        hub.add_folder(MODEL, repositories / "models" / MODEL, gated=True)
        hub.add_folder(STACK, repositories / "datasets" / STACK, "dataset")
        yield hub


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def ask(hub: Hub, path: str, *, token: str | None = TOKEN, method: str = "GET", **headers: str) -> Answer:
    """One answer, without following a redirect. headers: with _ in place of -."""
    url = path if path.startswith("http") else hub.url + path
    request = urllib.request.Request(url, method=method)
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=30) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, dict(error.headers), error.read())


def test_lfs_files_are_redirected_to_another_host_and_others_within_the_hub(hub: Hub) -> None:
    shard = ask(hub, f"/datasets/{STACK}/resolve/main/data/lua/train-00000-of-00002.parquet", method="HEAD")
    assert shard.status == 302
    assert shard.headers["Location"].startswith(hub.cdn_url)
    assert int(shard.headers["X-Linked-Size"]) > 100
    assert shard.headers["X-Repo-Commit"] == hub.repos[f"datasets/{STACK}"].head
    content = ask(hub, shard.headers["Location"], token=None)
    assert content.headers["ETag"] == shard.headers["X-Linked-ETag"]
    assert ask(hub, shard.headers["Location"]).status == 400  # a token must not leave the hub
    config = ask(hub, f"/{MODEL}/resolve/main/config.json", method="HEAD")
    assert config.status == 307
    assert config.headers["Location"].startswith("/api/resolve-cache/models/")
    assert json.loads(ask(hub, config.headers["Location"]).content)["model_type"] == "gpt_bigcode"


@pytest.mark.parametrize(
    ("requested", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=5-", 206, slice(5, None)),
        ("bytes=-4", 206, slice(-4, None)),
        ("bytes=2-99999999", 206, slice(2, None)),
        ("bytes=99999999-", 416, slice(0, 0)),
        ("lines=1-2", 200, slice(None)),
    ],
)
def test_ranges_of_a_file(hub: Hub, repositories: Path, requested: str, status: int, part: slice) -> None:
    path = "data/lua/train-00000-of-00002.parquet"
    whole = (repositories / "datasets" / STACK / path).read_bytes()
    location = ask(hub, f"/datasets/{STACK}/resolve/main/{path}", method="HEAD").headers["Location"]
    answer = ask(hub, location, token=None, Range=requested)
    assert (answer.status, answer.content) == (status, whole[part])
    if status == 206:
        start, stop, _ = part.indices(len(whole))
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    if status == 416:
        assert answer.headers["Content-Range"] == f"bytes */{len(whole)}"


REFUSED = {
    "gated, no token": (f"/{MODEL}/resolve/main/config.json", None, 401, "GatedRepo"),
    "gated, no terms": (f"/{MODEL}/resolve/main/config.json", STRANGER, 403, "GatedRepo"),
    "no such repository": ("/api/models/bigcode/nothing", TOKEN, 404, "RepoNotFound"),
    "hidden repository": ("/api/models/bigcode/nothing", None, 401, "RepoNotFound"),
    "no such revision": (f"/api/models/{MODEL}/revision/v9", TOKEN, 404, "RevisionNotFound"),
    "no such file": (f"/{MODEL}/resolve/main/none.json", TOKEN, 404, "EntryNotFound"),
    "no such folder": (f"/api/datasets/{STACK}/tree/main/none", TOKEN, 404, "EntryNotFound"),
    "a token that expired": (f"/api/models/{MODEL}", "hf_expired", 401, None),
}


@pytest.mark.parametrize(("path", "token", "status", "code"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_the_hubs(hub: Hub, path: str, token: str | None, status: int, code: str | None) -> None:
    answer = ask(hub, path, token=token)
    assert (answer.status, answer.headers.get("X-Error-Code")) == (status, code)


def test_information_and_card_of_a_gated_repository_are_open(hub: Hub) -> None:
    assert json.loads(ask(hub, f"/api/models/{MODEL}", token=None).content)["gated"] == "auto"
    assert ask(hub, f"/{MODEL}/resolve/main/README.md", token=None).status == 307


def test_a_fault_strikes_its_paths_as_often_as_it_says(hub: Hub) -> None:
    hub.add_faults(Fault("503", "*/config.json", times=2, after=1), Fault("429", "/api/*", retry_after="7"))
    path = f"/{MODEL}/resolve/main/config.json"
    assert [ask(hub, path).status for _ in range(4)] == [307, 503, 503, 307]
    busy = ask(hub, f"/api/models/{MODEL}")
    assert (busy.status, busy.headers["Retry-After"]) == (429, "7")
    assert ask(hub, f"/api/models/{MODEL}").status == 200
    assert json.loads(ask(hub, "/_injected").content) == {"503": 2, "429": 1}


def test_a_renamed_repository_redirects(hub: Hub) -> None:
    hub.rename(MODEL, "bigcode/starcoder-one")
    answer = ask(hub, f"/api/models/{MODEL}/revision/main")
    assert (answer.status, answer.headers["Location"]) == (
        307,
        "/api/models/bigcode/starcoder-one/revision/main",
    )


def test_a_tree_has_pages(hub: Hub) -> None:
    hub.page_size = 2
    url: str | None = f"/api/datasets/{STACK}/tree/main?recursive=true"
    pages = []
    while url is not None:
        answer = ask(hub, url)
        pages.append([entry["path"] for entry in json.loads(answer.content)])
        link = answer.headers.get("Link")
        url = None if link is None else link[1:].partition(">")[0]
    assert [len(page) for page in pages] == [2, 2, 1]
    assert len({path for page in pages for path in page}) == 5
