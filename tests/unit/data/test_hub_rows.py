"""Rows of data sets on a hub on loopback: with its failures, without a network, and errors that say what to
do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import SourceConfig
from flora_train.data.file_rows import Row
from flora_train.data.sources import read_rows
from flora_train.runtime.hub_client import ATTEMPTS
from flora_train.runtime.hub_snapshot import pin_commits, pinned_commits
from tests.hub_server import STRANGER, Fault, Hub, serve
from tests.hub_server.client import go_offline, start_again, use_hub
from tests.hub_server.faults import KINDS

STACK = "bigcode/the-stack-dedup"
KEY = f"datasets/{STACK}"
SHARDS, ROWS = 3, 40


def shard(folder: Path, number: int, rows: int = ROWS) -> list[Row]:
    """Write a shard of rows that are different in every shard."""
    folder.mkdir(parents=True, exist_ok=True)
    table = [{"content": f"return {number}, {row}\n" * 9, "path": f"{number}/{row}"} for row in range(rows)]
    file = folder / f"train-{number:05d}-of-{SHARDS:05d}.parquet"
    pq.write_table(pa.Table.from_pylist(table), file, row_group_size=10)
    return table


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """All rows of data/lua."""
    root = tmp_path / "stack"
    lua = [row for number in range(SHARDS) for row in shard(root / "data/lua", number)]
    shard(root / "data/racket", 7)
    (root / "README.md").write_text("---\nlicense: other\n---\n# The Stack\n")
    return lua


@pytest.fixture
def hub(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        hub.add_folder(STACK, tmp_path / "stack", "dataset")
        use_hub(monkeypatch, hub, tmp_path / "cache")
        yield hub


def read(**options: Any) -> list[Row]:
    return read_rows(SourceConfig(**{"hub": STACK, "data_dir": "data/lua", **options}), "tasks.lua.train")


def refusal(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(**options)
    (problem,) = caught.value.problems
    return str(problem)


def downloads(hub: Hub) -> list[str]:
    """Shards that were sent, once for each time."""
    paths = [path for method, path in hub.asked if method == "GET" and path.startswith("/cdn/")]
    return [path.rpartition("/")[2][6:11] for path in paths]


def test_rows_are_those_of_the_datasets_library(hub: Hub, rows: list[Row]) -> None:
    assert read() == rows
    assert read(max_rows=70) == rows[:70]
    assert read(split="train[:10]") == rows[:10]
    assert read(data_dir=None, split="train[-1:]")[0]["path"].startswith("7/")


def test_a_limit_on_rows_downloads_no_more_shards_than_hold_them(hub: Hub, rows: list[Row]) -> None:
    assert read(max_rows=ROWS) == rows[:ROWS]
    assert downloads(hub) == ["00000"]
    assert read(max_rows=ROWS + 1) == rows[: ROWS + 1]
    assert downloads(hub) == ["00000", "00001"]


SURVIVED = {
    "429 with Retry-After": Fault("429", times=3),
    "503 with Retry-After": Fault("503", times=5),
    "503 for every path": Fault("503", times=3, each=True),
    "503 of the content network": Fault("503", "/cdn/*", times=4),
    "Retry-After is a date": Fault("503", times=2, retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),
    "Retry-After is missing": Fault("429", times=2, retry_after=None),
    "no answer": Fault("refuse", times=4),
    "dropped in the middle of every shard": Fault("drop", "/cdn/*", each=True),
    "dropped several times in a row": Fault("drop", "/cdn/*", times=4),
    "dropped listing": Fault("drop", "*/tree/*", times=2),
    "another size": Fault("resize", "/cdn/*", times=2),
    "another content": Fault("corrupt", "/cdn/*", times=2),
    "a commit before every shard": Fault("commit", "*/resolve/*.parquet", each=True),
    "absolute redirect": Fault("redirect", "*/resolve/*", times=3),
    "relative redirect": Fault("relative redirect", "*/resolve/*", times=3),
    "slow": Fault("slow", "*/resolve/*", times=2),
}


@pytest.mark.parametrize("fault", SURVIVED.values(), ids=SURVIVED)
def test_failures_that_pass_end_in_the_same_rows(hub: Hub, rows: list[Row], fault: Fault) -> None:
    fault = Fault(**{**vars(fault), "seen": type(fault.seen)()})
    hub.add_faults(fault)
    assert read(max_rows=110) == rows[:110]
    assert hub.injected[fault.kind] >= min(fault.times, 2) or fault.each


def test_every_failure_at_once_ends_in_the_same_rows(hub: Hub, rows: list[Row]) -> None:
    hub.add_faults("all")
    assert read() == rows
    start = {"429", "503", "refuse", "drop", "resize", "commit", "redirect", "relative redirect"}
    assert start <= set(hub.injected)
    assert hub.injected.keys() <= KINDS.keys()


def test_all_files_are_of_one_commit_which_is_recorded(hub: Hub, rows: list[Row], tmp_path: Path) -> None:
    commit = hub.repos[KEY].head
    hub.add_faults(Fault("commit", "*/resolve/*00000-of*.parquet"))
    assert read() == rows
    assert hub.repos[KEY].head != commit
    assert pinned_commits() == {f"{KEY}@main": commit}


def test_a_pinned_commit_is_read_although_the_branch_moved(
    hub: Hub, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.repos[KEY].head
    table = pa.table({"content": ["new"], "path": ["new"]})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    hub.commit(KEY, {"data/lua/train-00000-of-00003.parquet": sink.getvalue().to_pybytes()})
    assert len(read()) == (SHARDS - 1) * ROWS + 1
    start_again(monkeypatch)
    pin_commits({f"{KEY}@main": commit})
    assert read() == rows


def test_a_branch_a_tag_and_a_commit_are_revisions(hub: Hub, rows: list[Row], tmp_path: Path) -> None:
    other = shard(tmp_path / "v1/data/lua", 9)
    hub.add_folder(STACK, tmp_path / "v1", "dataset", revision="v1")
    assert read(revision="v1") == other
    assert read(revision=hub.repos[KEY].commit_of("v1")) == other
    assert read(revision=hub.repos[KEY].head) == rows


def test_a_renamed_data_set_is_found_by_its_former_name(hub: Hub, rows: list[Row]) -> None:
    hub.rename(STACK, "bigcode/stack-two", "dataset")
    assert read() == rows
    assert read(hub="bigcode/stack-two") == rows


def test_a_listing_of_many_pages_is_complete(hub: Hub, rows: list[Row]) -> None:
    hub.page_size = 2
    assert read() == rows
    assert [path for method, path in hub.asked if "/tree/" in path].count(
        f"/api/datasets/{STACK}/tree/{hub.repos[KEY].head}/data/lua"
    ) == 2


def test_a_cache_that_was_filled_serves_the_same_rows_without_a_network(
    hub: Hub, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(max_rows=70) == rows[:70]
    hub.asked.clear()
    go_offline(monkeypatch)
    assert read(max_rows=70) == rows[:70]
    assert read(max_rows=10) == rows[:10]
    line = refusal(max_rows=100)
    assert "its file data/lua/train-00002-of-00003.parquet is not in the local cache" in line
    assert "HF_HUB_OFFLINE forbids access to the hub: unset it" in line
    assert "racket is not in" not in refusal(data_dir="data/racket")
    assert hub.asked == []


def test_a_cache_that_the_hubs_client_filled_is_read_without_a_network(
    hub: Hub, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(STACK, repo_type="dataset", allow_patterns=["data/lua/*"])
    go_offline(monkeypatch)
    assert read() == rows


def test_a_hub_that_is_down_is_replaced_by_the_cache_with_a_note(
    hub: Hub, rows: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert read() == rows
    start_again(monkeypatch)
    hub.add_faults(Fault("503", times=1000))
    with caplog.at_level(logging.WARNING):
        assert read() == rows
    assert "The local cache has its commit" in caplog.text


def test_a_damaged_file_in_the_cache_is_downloaded_again(
    hub: Hub, rows: list[Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert read(max_rows=5) == rows[:5]
    (file,) = (tmp_path / "cache").rglob("*00000-of-00003.parquet")
    file.resolve().write_bytes(file.read_bytes()[:100])
    start_again(monkeypatch)
    assert read(max_rows=5) == rows[:5]


@pytest.mark.parametrize("fallback_hint", [None, "data_config=local"])
def test_a_gated_data_set_says_how_to_get_it_and_what_can_stand_in(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback_hint: str | None
) -> None:
    hub.repos[KEY].gated = True
    page = f"{hub.url}/datasets/{STACK}"
    use_hub(monkeypatch, hub, tmp_path / "cache", token=None)
    line = refusal(fallback_hint=fallback_hint)
    assert f"is gated: accept its terms on {page}, then run `hf auth login`" in line
    assert line.endswith(f"Instead, use {fallback_hint or 'files or a folder'}")
    use_hub(monkeypatch, hub, tmp_path / "cache", token=STRANGER)
    line = refusal(fallback_hint=fallback_hint)
    assert f"is gated, and this login has no access: accept its terms on {page} with the account" in line


PERMANENT = {
    "name": ({"hub": "bigcode/nothing"}, "the hub has no such data set, or this login may not see it: check"),
    "revision": ({"revision": "v9"}, "has no revision v9: give a branch, tag or commit that"),
    "commit": ({"revision": "0" * 40}, "has no commit 000000000000 (any more): give another revision"),
    "folder": ({"data_dir": "data/lu"}, "has no folder 'data/lu' at commit"),
    "split": ({"split": "tests"}, "has no split 'tests': its splits are train"),
    "not a name": ({"hub": "a/b/c"}, "is not a name of a data set on the hub (ORG/NAME)"),
}


@pytest.mark.parametrize(("options", "reason"), PERMANENT.values(), ids=PERMANENT)
def test_what_does_not_exist_is_one_clear_error_without_waiting(
    hub: Hub, options: dict[str, str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refusal(**options)
    assert reason in line
    assert line.startswith("tasks.lua.train.hub = ")
    assert len(hub.asked) < 8
    assert capfd.readouterr().err == ""


def test_a_refused_token_is_one_clear_error(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hub(monkeypatch, hub, tmp_path / "cache", token="hf_expired")
    assert (
        "the hub refuses the login: run `hf auth login` with a valid token, or correct HF_TOKEN" in refusal()
    )


def test_the_clients_own_attempts_are_not_shown(
    hub: Hub, rows: list[Row], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_faults(Fault("503", "/cdn/*", times=2), Fault("429", "/api/*", times=2), Fault("drop", "/cdn/*"))
    assert read() == rows
    assert capfd.readouterr().err == ""
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("flora_train")]
    assert f"{STACK}: the hub answered 503; trying again in 1s" in logged
    assert not [record for record in caplog.records if record.name.startswith("huggingface_hub")]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("503", f"the hub still answered 503 after {ATTEMPTS} attempts: try again later"),
        ("corrupt", "has another content than its commit says, 6 times: it changes on the hub"),
        ("resize", "a file has another size than the hub says"),
        ("refuse", "the hub cannot be reached"),
    ],
)
def test_a_failure_that_does_not_pass_ends_with_its_reason(hub: Hub, kind: str, reason: str) -> None:
    hub.add_faults(Fault(kind, "/cdn/*", times=10_000))
    assert reason in refusal()


def test_configurations_and_splits_of_a_description_are_read(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "multi"
    (folder / "humaneval-lua").mkdir(parents=True)
    text = "".join(json.dumps({"name": f"p{i}"}) + "\n" for i in range(3))
    (folder / "humaneval-lua/test-0.jsonl").write_text(text)
    (folder / "other").mkdir()
    (folder / "other/all.jsonl").write_text(text * 2)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: humaneval-lua\n  data_files:\n"
        "  - split: test\n    path: humaneval-lua/test-*\n"
        "- config_name: other\n  data_files:\n  - split: train\n    path: other/*\n---\n"
    )
    hub.add_folder("nuprl/MultiPL-E", folder, "dataset")
    options = {"hub": "nuprl/MultiPL-E", "data_dir": None}
    assert read(**options, subset="humaneval-lua", split="test") == [{"name": f"p{i}"} for i in range(3)]
    assert len(read(**options, subset="other")) == 6
    assert "has several configurations: set subset to humaneval-lua or other" in refusal(**options)
    line = refusal(**options, subset="humaneval-rkt")
    assert "has no configuration 'humaneval-rkt': set subset to humaneval-lua or other" in line


def test_a_very_large_file_is_streamed_and_survives_a_dropped_connection(
    hub: Hub, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr("flora_train.data.hub_dataset.LARGEST_DOWNLOAD", 100)
    hub.add_faults(Fault("drop", "/cdn/*", times=2), Fault("503", "*/resolve/*", times=2))
    assert read(max_rows=110) == rows[:110]


def test_rows_without_content_are_empty_and_a_shard_without_the_column_is_read_as_such(
    hub: Hub, rows: list[Row], tmp_path: Path
) -> None:
    shards = tmp_path / "stack/data/lua"
    table = pa.table({"content": ["x", None, ""], "path": ["a", "b", "c"]})
    pq.write_table(table, shards / "train-00001-of-00003.parquet")
    pq.write_table(pa.table({"path": ["d"]}), shards / "train-00002-of-00003.parquet")
    given = read()
    assert [row["content"] for row in given[ROWS:]] == ["x", None, "", None]


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", b"<html>"])
def test_a_shard_that_is_damaged_on_the_hub_is_named(
    hub: Hub, tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    file = "data/lua/train-00001-of-00003.parquet"
    (tmp_path / "stack" / file).write_bytes(content)
    line = refusal()
    assert f"its file {file} cannot be read (" in line
    assert line.count("\n") == 0
    assert capfd.readouterr().err == ""


def test_a_shard_with_other_columns_is_named(hub: Hub, tmp_path: Path) -> None:
    file = "data/lua/train-00002-of-00003.parquet"
    pq.write_table(pa.table({"text": ["x"], "n": [1]}), tmp_path / "stack" / file)
    assert f"its file {file} cannot be read (" in refusal()


def test_data_set_that_a_script_reads_is_read_from_its_conversion(hub: Hub, tmp_path: Path) -> None:
    """As google/fleurs is: the main branch has a script and archives, another one has parquet files."""
    scripted, converted = tmp_path / "scripted", tmp_path / "converted"
    scripted.mkdir()
    (scripted / "fleurs.py").write_text("VERSION = 1\n")
    (scripted / "README.md").write_text("# FLEURS\n")
    table = pa.Table.from_pylist([{"transcription": "jedna"}, {"transcription": "dva"}])
    for split in ("train", "test"):
        (converted / "cs_cz" / split).mkdir(parents=True)
        pq.write_table(
            table.slice(0, 2 if split == "train" else 1), converted / "cs_cz" / split / "0000.parquet"
        )
    hub.add_folder("google/fleurs", scripted, "dataset")
    hub.add_folder("google/fleurs", converted, "dataset", revision="refs/convert/parquet")
    message = refusal(hub="google/fleurs", data_dir=None, subset="cs_cz")
    assert (
        "is read by a script, which datasets no longer runs: set revision to refs/convert/parquet" in message
    )
    options = {"hub": "google/fleurs", "data_dir": "cs_cz", "revision": "refs/convert/parquet"}
    assert read(**options) == table.to_pylist()
    assert read(**options, split="test") == table.to_pylist()[:1]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def lines(*texts: str) -> str:
    return "".join(json.dumps({"content": text}) + "\n" for text in texts)


@pytest.mark.parametrize("folder", ["data/lua/", "./data/lua", "/data/lua", "data//lua", "data/l*"])
def test_a_folder_is_found_however_it_is_written(hub: Hub, rows: list[Row], folder: str) -> None:
    assert read(data_dir=folder) == rows


@pytest.mark.parametrize("climb", ["", "../" * 2, "../" * 12])
@pytest.mark.parametrize("split", ["train", "train[:1]"])
def test_a_description_cannot_name_files_of_this_machine(
    hub: Hub, tmp_path: Path, climb: str, split: str
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = str(secret)
    if climb:
        path = climb + path.lstrip("/")
    card = f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n"
    hub.add_folder("o/s", write(tmp_path / "s", {"README.md": card, "train.jsonl": lines("x")}), "dataset")
    line = refusal(hub="o/s", data_dir=None, split=split)
    assert "does not belong to it" in line or "Unable to find" in line


def test_shards_without_rows_are_left_out(hub: Hub, rows: list[Row], tmp_path: Path) -> None:
    shards = tmp_path / "stack/data/lua"
    empty = pq.read_table(shards / "train-00000-of-00003.parquet").slice(0, 0)
    pq.write_table(empty, shards / "train-00000-of-00003.parquet")
    assert read() == rows[ROWS:]
    files = {"train-0.jsonl": "", "train-1.jsonl": lines("x", "y"), "train-2.jsonl": ""}
    hub.add_folder("o/empty", write(tmp_path / "empty", files), "dataset")
    assert read(hub="o/empty", data_dir=None) == [{"content": "x"}, {"content": "y"}]


def test_tables_in_archives_are_read(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    for number in range(2):
        with ZipFile(folder / f"train{number}.zip", "w") as archive:
            archive.writestr("a.jsonl", lines(f"{number}a", f"{number}b"))
    hub.add_folder("o/archives", folder, "dataset")
    given = read(hub="o/archives", data_dir=None)
    assert [row["content"] for row in given] == ["0a", "0b", "1a", "1b"]
    assert read(hub="o/archives", data_dir=None, split="train[1:3]") == given[1:3]


def test_a_program_is_not_run_and_its_converted_rows_are_read(hub: Hub, tmp_path: Path) -> None:
    hub.add_folder("o/old", write(tmp_path / "old", {"old.py": "import datasets\n"}), "dataset")
    converted = tmp_path / "converted"
    table = shard(converted / "default/train", 0)
    hub.add_folder("o/old", converted, "dataset", revision="refs/convert/parquet")
    line = refusal(hub="o/old", data_dir=None)
    assert "is read by a script, which datasets no longer runs" in line
    assert "refs/convert/parquet" in line
    assert "network" not in line
    assert read(hub="o/old", data_dir=None, revision="refs/convert/parquet") == table


def test_media_are_not_decoded(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    clip = {"bytes": b"RIFF", "path": "a.wav"}
    table = [{"clips": [clip], "film": clip, "content": "x"}]
    features = {
        "clips": {"feature": {"_type": "Audio"}, "_type": "List"},
        "film": {"_type": "Video"},
        "content": {"dtype": "string", "_type": "Value"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.Table.from_pylist(table).replace_schema_metadata(metadata), folder / "train.parquet")
    hub.add_folder("o/media", folder, "dataset")
    assert read(hub="o/media", data_dir=None) == table


def test_a_damaged_shard_is_one_line_without_temporary_folders(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stack/data/lua/train-00001-of-00003.parquet").write_bytes(b"<html>")
    refusal()
    assert "Failed to read" not in capfd.readouterr().err
    card = "---\nconfigs:\n- config_name: a\n  data_files: none.jsonl\n---\n"
    hub.add_folder("o/s", write(tmp_path / "s", {"README.md": card}), "dataset")
    line = refusal(hub="o/s", data_dir=None)
    assert "Unable to find 'none.jsonl')" in line
    assert "flora_train_hub_" not in line


def test_a_token_that_cannot_be_one_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "caf\u00e9")
    assert "correct HF_TOKEN" in refusal()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device without room here")
def test_a_cache_without_room_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*args: object, **options: object) -> str:
        with open("/dev/full", "w") as file:
            file.write("x")
        return ""

    monkeypatch.setattr("huggingface_hub.hf_hub_download", cannot)
    line = refusal()
    assert f"{tmp_path / 'cache'}): No space left on device; set HF_HOME" in line


def test_a_commit_that_the_cache_has_is_not_written_again(
    hub: Hub, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read() == rows
    (reference,) = (tmp_path / "cache").glob("*/refs/main")
    before = reference.stat().st_ino
    start_again(monkeypatch)
    assert read() == rows
    assert reference.stat().st_ino == before
