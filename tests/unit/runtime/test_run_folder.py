"""Run folders: no file of a user is overwritten, and no file of a run is partly written."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.runtime.atomic import disk_errors, write_atomically
from flora_train.runtime.config_changes import FINAL_EVALUATION_KEYS
from flora_train.runtime.run_folder import RunFolder, open_run
from tests.unit.training.small_disk import file_size_limit


def run_config(mode: str = "refuse", steps: int = 5, **changes: Any) -> RunConfig:
    """mode: what to do with a run that is there: refuse, replace or resume."""
    return validate(
        {
            "name": "test",
            "overwrite": mode == "replace",
            "resume": mode == "resume",
            **changes,
            "model": {"path": "unused"},
            "tasks": {"a": {"train": "unused.jsonl"}},
            "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
            "training": {"steps": steps},
        }
    )


def overwrite(path: Path, finished: bool) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(run_config())
    folder.update_run_json(finished=finished)
    (path / "precious").write_text("result")
    return folder


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("mode", ["refuse", "resume", "replace"])
@pytest.mark.parametrize("made", [False, True], ids=["absent", "empty"])
def test_free_folder_is_claimed(tmp_path: Path, mode: str, made: bool) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    if made:
        folder.path.mkdir(parents=True)
    assert folder.status(run_config(mode)) == "new"
    folder.claim(run_config(mode))
    assert not folder.finished
    assert sorted(content(folder.path)) == [".lock", "config.yaml", "run.json"]
    _, reread = open_run(folder.path)
    assert reread == run_config(mode)


@pytest.mark.parametrize(
    ("finished", "told"),
    [
        (True, "a finished run: choose another output_dir, or overwrite=true to delete it"),
        (
            False,
            "an unfinished run: choose another output_dir, resume=true to continue it, or overwrite=true",
        ),
    ],
)
def test_refuse_keeps_any_run_and_says_how_to_go_on(tmp_path: Path, finished: bool, told: str) -> None:
    folder = overwrite(tmp_path, finished)
    before = content(tmp_path)
    for action in (folder.status, folder.claim):
        with pytest.raises(UserError, match=f"output_dir = .*: holds {told}"):
            action(run_config("refuse"))
    assert content(tmp_path) == before


def test_resume_keeps_a_finished_run_of_the_same_configuration(tmp_path: Path) -> None:
    folder = overwrite(tmp_path, finished=True)
    before = content(tmp_path)
    assert folder.status(run_config("resume")) == "finished"
    assert content(tmp_path) == before


def test_resume_continues_an_unfinished_run(tmp_path: Path) -> None:
    folder = overwrite(tmp_path, finished=False)
    begun = json.loads(folder.run_json.read_text())["started"]
    config = run_config("resume", num_threads=3)  # how a run is computed may change
    assert folder.status(config) == "interrupted"
    folder.claim(config)
    assert content(tmp_path)["precious"] == b"result"
    assert json.loads(folder.run_json.read_text())["started"] == begun
    assert open_run(tmp_path)[1].num_threads == 3


def test_resume_deletes_what_killed_writes_left_and_nothing_else(tmp_path: Path) -> None:
    overwrite(tmp_path, finished=False)
    left = (
        "adapters/.a-lora.7.tmp/adapter_config.json",
        "adapters/.a-lora.7.tmp/.adapter_model.safetensors.7.tmp",
        "eval/.report.json.7.tmp",
        "checkpoints/best/.a-lora.safetensors.7.tmp",
    )
    kept = ("adapters/.notes.7.tmp", "adapters/a-lora/adapter_config.json", "eval/.report.json.old")
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "adapters" / ".a-lora.8.tmp").mkdir()
    RunFolder(tmp_path).claim(run_config("resume"))
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in kept)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [".notes.7.tmp", "a-lora"]


@pytest.mark.parametrize("finished", [True, False])
def test_resume_refuses_a_run_of_another_configuration_and_names_what_differs(
    tmp_path: Path, finished: bool
) -> None:
    folder = overwrite(tmp_path, finished)
    before = content(tmp_path)
    for action in (folder.status, folder.claim):
        with pytest.raises(UserError) as caught:
            action(run_config("resume", steps=6, seed=3))
        assert [str(problem).split(" when ")[0] for problem in caught.value.problems] == [
            "seed = 3: was 0",
            "training.steps = 6: was 5",
        ]
    assert content(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_replace_deletes_the_run_only_when_the_new_one_claims_the_folder(
    tmp_path: Path, finished: bool
) -> None:
    folder = overwrite(tmp_path, finished)
    assert folder.status(run_config("replace", steps=6)) == "new"
    assert "precious" in content(tmp_path)
    folder.claim(run_config("replace", steps=6))
    assert sorted(content(tmp_path)) == [".lock", "config.yaml", "precious", "run.json"]
    assert open_run(tmp_path)[1].training.steps == 6


FOREIGN = {
    "notes": {"notes.txt": "mine"},
    "other-run.json": {"run.json": '{"laps": 3}', "notes.txt": "mine"},
    "list-run.json": {"run.json": "[1, 2]"},
    "broken-run.json": {"run.json": '{"finished": tr'},
}


@pytest.mark.parametrize("mode", ["refuse", "resume", "replace"])
@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_folder_without_a_run_is_never_deleted(tmp_path: Path, files: dict[str, str], mode: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = content(tmp_path)
    for action in (RunFolder(tmp_path).status, RunFolder(tmp_path).claim):
        with pytest.raises(UserError, match="is not empty and holds no run: choose another folder"):
            action(run_config(mode))
    assert content(tmp_path) == before


def test_file_in_the_folder_s_place_is_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match="holds no run"):
        RunFolder(path).claim(run_config("replace"))
    assert path.read_text() == "mine"


def test_opening_a_folder_without_a_run_says_where_runs_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder .* runs are in outputs/"):
        open_run(tmp_path)


def test_run_whose_disk_filled_up_while_it_began_can_be_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    room = len(json.dumps(run_state(tmp_path), indent=2)) + 1
    with file_size_limit(room), pytest.raises(UserError, match=r"config\.yaml: the disk is full"):
        folder.claim(run_config().model_copy(update={"name": "x" * 2 * room}))
    folder.claim(run_config("replace"))
    assert sorted(content(folder.path)) == [".lock", "config.yaml", "run.json"]


def run_state(tmp_path: Path) -> dict[str, Any]:
    folder = RunFolder(tmp_path / "other")
    folder.claim(run_config())
    return json.loads(folder.run_json.read_text())


def test_metrics_are_read_back_by_kind_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics("step") == []
    for step, kind in enumerate(("step", "evaluation", "step")):
        folder.append_metrics({"kind": kind, "step": step})
    assert [record["step"] for record in folder.read_metrics("step")] == [0, 2]
    assert [record["step"] for record in folder.read_metrics("evaluation")] == [1]


@pytest.mark.parametrize("padding", [10, 30_000], ids=["short-lines", "lines-longer-than-the-buffer"])
def test_metrics_line_that_does_not_fit_is_taken_back(tmp_path: Path, padding: int) -> None:
    folder = RunFolder(tmp_path)
    record = {"kind": "step", "text": "x" * padding}
    folder.append_metrics(record)
    room = 2 * folder.metrics.stat().st_size + padding // 2
    folder.append_metrics(record)
    whole = folder.metrics.read_bytes()
    with (
        file_size_limit(room),
        pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full .* free some space and run again"),
    ):
        folder.append_metrics(record)
    assert folder.metrics.read_bytes() == whole
    folder.append_metrics(record)
    assert len(folder.read_metrics("step")) == 3


def test_metrics_that_may_not_be_written_are_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(os, "truncate", refused)
    with pytest.raises(
        UserError, match=r"metrics\.jsonl: may not be written .Permission denied.: choose another place"
    ):
        RunFolder(tmp_path).append_metrics({"kind": "step"})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            r"may not be written \(Permission denied\): choose another place",
        ),
    ],
)
def test_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, error: OSError, told: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail_halfway(temporary: Path) -> None:
        temporary.write_text("ne")
        raise error

    with pytest.raises(UserError, match=f"file: {told}"):
        write_atomically(path, fail_halfway)
    assert content(tmp_path) == {"file": b"old"}


def test_interrupted_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert content(tmp_path) == {"file": b"old"}


def test_file_is_synced_before_the_rename_and_its_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    sync, rename = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        happened.append("name")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    write_atomically(tmp_path / "file", lambda temporary: temporary.write_text("new"))
    assert happened == ["file", "name", "folder"]


def test_write_past_a_file_size_limit_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with file_size_limit(100), pytest.raises(UserError, match="the disk is full"):
        write_atomically(path, lambda temporary: temporary.write_text("x" * 101))
    assert content(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.EROFS, "Read-only file system.: choose a place that can be written to"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "Permission denied.: choose another place, or change its permissions"),
        (errno.ENAMETOOLONG, "File name too long.: choose shorter names"),
        (errno.ELOOP, "symbolic links.: links lead in a circle"),
        (errno.ENOTDIR, "Not a directory.: a file is in the way"),
        (errno.EISDIR, "Is a directory.: a folder is in the way"),
        (errno.EIO, "Input/output error.: the disk reports an error"),
        (errno.ENODEV, "No such device.: choose another place"),
        (errno.ESTALE, "Stale file handle.: choose another place"),
        (errno.EMFILE, "Too many open files.: too many files are open: raise the limit"),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_disk_errors_name_file_and_fix_for_every_error_of_the_system(
    tmp_path: Path, code: int, told: str
) -> None:
    path = tmp_path / "nowhere" / "file"
    passed_on = RuntimeError(
        f"Error while serializing: I/O error (os error {code})"
    )  # as safetensors passes it on
    for error in (OSError(code, os.strerror(code)), passed_on):
        with pytest.raises(UserError, match=f"nowhere/file: .*{told}"), disk_errors(path):
            raise error


def test_a_file_of_the_longest_name_is_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), lambda path: path.write_text("content"))
    assert content(tmp_path) == {"x" * 255: b"content"}
    with pytest.raises(UserError, match="File name too long"):
        write_atomically(tmp_path / ("x" * 256), lambda path: path.write_text("content"))


def test_a_new_file_does_not_replace_one_that_was_made_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(UserError, match="exists already"):
        write_atomically(
            path, lambda temporary: (temporary.write_text("new"), path.write_text("theirs")), new=True
        )
    assert content(tmp_path) == {"file": b"theirs"}
    path.unlink()
    write_atomically(path, lambda temporary: temporary.write_text("new"), new=True)
    assert content(tmp_path) == {"file": b"new"}


def test_an_adapter_name_too_long_for_a_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = run_config()
    config = config.model_copy(update={"adapters": {"x" * 240: config.adapters["lora"]}})
    with pytest.raises(UserError, match="is too long for a file name"):
        RunFolder(tmp_path / "run").status(config)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_pass_through_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), disk_errors(tmp_path):
        raise ValueError("mine")
    with disk_errors(tmp_path):
        pass


def changed(config: RunConfig, **evaluation: Any) -> RunConfig:
    return validate({**config.model_dump(mode="json"), "evaluation": evaluation})


ONLY_AT_THE_END = {
    "bootstrap_samples": 300, "confidence": 0.9, "max_new_tokens": 5, "problems": ["starter"],
    "languages": ["lua"], "max_problems": 3, "num_samples": 4, "pass_at_k": [2], "temperature": 0.5,
    "top_p": 0.5, "beams": 2, "embedded_clips": 1, "batch_rows": 2, "sandbox": "none", "cpu_seconds": 3.0,
    "workers": 1,
}  # fmt: skip
DURING_TRAINING = {"interval": 3, "select_best": False, "max_examples": 7}


def test_every_key_of_the_evaluation_is_known_to_decide_training_or_not() -> None:
    assert ONLY_AT_THE_END.keys() | DURING_TRAINING.keys() == EvaluationConfig.model_fields.keys()
    assert ONLY_AT_THE_END.keys() == FINAL_EVALUATION_KEYS


@pytest.mark.parametrize("key", ONLY_AT_THE_END)
def test_settings_used_only_for_evaluation_may_change_on_resume(tmp_path: Path, key: str) -> None:
    folder = overwrite(tmp_path, finished=False)
    config = changed(
        run_config("resume"),
        **({"num_samples": 2, "pass_at_k": [2]} if key == "pass_at_k" else {key: ONLY_AT_THE_END[key]}),
    )
    assert folder.status(config) == "interrupted"
    folder.claim(config)
    assert open_run(tmp_path)[1].evaluation == config.evaluation


@pytest.mark.parametrize("key", DURING_TRAINING)
def test_settings_that_select_adapters_may_not_change_on_resume(tmp_path: Path, key: str) -> None:
    folder = overwrite(tmp_path, finished=False)
    with pytest.raises(UserError, match=f"evaluation.{key} = "):
        folder.status(changed(run_config("resume"), **{key: DURING_TRAINING[key]}))


def test_finished_run_with_another_evaluation_is_refused(tmp_path: Path) -> None:
    folder = overwrite(tmp_path, finished=True)
    with pytest.raises(UserError, match=r"evaluation\.num_samples = 3: was 20"):
        folder.status(changed(run_config("resume"), num_samples=3))


def test_texts_of_a_task_that_are_not_learnt_may_change_on_resume(tmp_path: Path) -> None:
    folder = overwrite(tmp_path, finished=False)
    raw = run_config("resume").model_dump(mode="json")
    for key, value in {"sample_prompts": ["a"], "license": "mit", "language": "lua"}.items():
        task = {**raw["tasks"]["a"], key: value}
        assert folder.status(validate({**raw, "tasks": {"a": task}})) == "interrupted"
    with pytest.raises(UserError, match=r"tasks\.a\.truncation"):
        folder.status(validate({**raw, "tasks": {"a": {**raw["tasks"]["a"], "truncation": "drop"}}}))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "text", ["name: [", "nam: x", "", None], ids=["damaged", "unknown", "empty", "missing"]
)
def test_configuration_that_cannot_be_read_is_an_error_and_not_nothing_to_compare(
    tmp_path: Path, finished: bool, text: str | None
) -> None:
    folder = overwrite(tmp_path, finished)
    folder.metrics.touch()
    folder.config.unlink()
    if text is not None:
        folder.config.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        folder.status(run_config("resume", seed=5))


def test_run_of_hundreds_of_tasks_is_opened_and_compared(tmp_path: Path) -> None:
    raw = run_config("resume").model_dump(mode="json")
    raw["tasks"] = {f"t{i}": {"train": "unused.jsonl"} for i in range(400)}
    config = validate(raw)
    folder = RunFolder(tmp_path / "run")
    folder.claim(config)
    folder.update_run_json(finished=True)
    assert open_run(folder.path)[1] == config
    assert folder.status(config) == "finished"
    with pytest.raises(UserError, match="seed = 5: was 0"):
        folder.status(validate({**raw, "seed": 5}))
