"""flora-train push: puts adapters of a run on the Hugging Face hub, with their cards and the report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field

from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.config.base import ConfigModel, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import UserError, choices, did_you_mean, first_line, user_error
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import print_plain
from flora_train.evaluation.report.files import read_report_if_any
from flora_train.export.hub_repository import MANIFEST, Entries, Repository, Staging, read_entries, stage
from flora_train.run_context import check_base
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.hub_client import AnswerError, check_repository_name, with_retries
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.training.origin import OriginOptions

logger = logging.getLogger(__name__)

LOCALLY = "or use the folders as they are: plain peft loads them"
MESSAGE_LENGTH = 200
"""Characters of a commit message."""


class PushOptions(ConfigModel):
    repo: Text
    """ORG/NAME (or YOU/NAME) on the hub."""
    repo_per_adapter: bool = False
    """A repository ORG/NAME-ADAPTER for each, and a collection NAME, instead of one repository with a folder
    each."""
    base: Text | None = None
    """Name of the base model on the hub, which the adapters refer to. Default: model.path of the recipe."""
    public: bool = False
    """Visible to everybody. Default: private."""
    pause: float = Field(1.0, ge=0, le=86_400)
    """Seconds between two repositories: the hub limits how fast they are created."""
    dry_run: bool = False
    """Print what would be created; the hub is not contacted."""
    allow_different_base: bool = False
    """Accept another base at model.path than the run was trained on. The cards say so."""


def push_run(run: str, names: Sequence[str] = (), **values: object) -> None:
    """Put adapters of a run (default: all) on the hub. values: PushOptions.

    Files that are there already are not sent again, so that a second call finishes what the first left.
    Raises UserError.
    """
    options = read_options(PushOptions, values)
    folder, config = open_run(run)
    chosen = _chosen_specs(config, names)
    _check_names(chosen, options)
    folder.share()
    try:
        _check_finished(folder, chosen)
        _push(folder, config, chosen, options)
    finally:
        folder.unlock()


def _chosen_specs(config: RunConfig, names: Sequence[str]) -> list[AdapterSpec]:
    """The adapters of these names, or all. Raises UserError for an unknown name."""
    specs = {spec.name: spec for spec in expand(config)}
    for name in names:
        if name not in specs:
            raise user_error("adapter", name, f"there are {choices(specs)}.{did_you_mean(name, specs)}")
    return [specs[name] for name in dict.fromkeys(names)] or list(specs.values())


def _check_names(chosen: Sequence[AdapterSpec], options: PushOptions) -> None:
    """Raises UserError for a name that no repository can have."""
    check_repository_name(options.repo)
    if options.base is not None and "/" in options.base and not Path(options.base).exists():
        check_repository_name(options.base, "base")
    if options.repo_per_adapter:
        for spec in chosen:
            check_repository_name(f"{options.repo}-{spec.name}", f"repo_per_adapter: {spec.name}")


def _check_finished(folder: RunFolder, chosen: Sequence[AdapterSpec]) -> None:
    """Raises UserError where a run is not finished, or an adapter was deleted."""
    run = str(folder.path)
    if not folder.finished:
        raise user_error(
            "run", run, "is not finished: it is still training, or can be resumed with resume=true"
        )
    missing = [spec.name for spec in chosen if not (folder.adapters / spec.name).is_dir()]
    if missing:
        raise user_error("run", run, f"has no folder of {missing[0]}: flora-train export {run} writes it")


def _push(folder: RunFolder, config: RunConfig, chosen: Sequence[AdapterSpec], options: PushOptions) -> None:
    """Stage and send, while no other process trains in the folder."""
    report = read_report_if_any(folder)
    differences = check_base(folder, config, OriginOptions(allow_different_base=options.allow_different_base))
    base = options.base or config.model.path
    with _temporary_folder() as place:
        origin = " ".join(differences)
        staging = Staging(options.repo, place, options.base, options.repo_per_adapter, origin, report)
        repositories = stage(folder, config, chosen, staging)
        if Path(base).exists():
            hint = "which is a folder of this machine: --base ORG/MODEL names it on the hub"
            logger.warning(f"the adapters call their base {base}, {hint}")
        if options.dry_run:
            _print_repositories(repositories, options)
        else:
            _send(repositories, options)


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Raises UserError where there is no room for one."""
    with disk_errors(Path(os.environ.get("TMPDIR", "/tmp"))):
        folder = TemporaryDirectory()
    with folder as name:
        yield Path(name)


def _print_repositories(repositories: Sequence[Repository], options: PushOptions) -> None:
    """Print what would be created."""
    visibility = "public" if options.public else "private"
    for repository in repositories:
        sizes = {path: file.stat().st_size for path, file in repository.files.items()}
        sizes |= {path: len(content) for path, content in repository.overview({}).items()}
        print_plain(f"{repository.name}  {visibility}, {sum(sizes.values()) / 1e6:.1f} MB")
        for path, size in sizes.items():
            print_plain(f"  {path}  {size:,} bytes")
    if options.repo_per_adapter:
        print_plain(f"collection {options.repo}  {len(repositories)} items")


def _send(repositories: Sequence[Repository], options: PushOptions) -> None:
    """Create the repositories and commit their files. Raises UserError where the hub refuses, or the
    connection breaks."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api, user = HfApi(library_name="flora_train"), ""
    try:
        user = with_retries(lambda: str(api.whoami()["name"]))
        _send_all(api, repositories, options)
    except LocalTokenNotFoundError as error:
        raise _failed(options, "requires a login: hf auth login, or HF_TOKEN=...;") from error
    except OfflineModeIsEnabled as error:
        raise _failed(options, "cannot be reached, HF_HUB_OFFLINE=1 forbids it: unset it,") from error
    except HfHubHTTPError as error:
        raise _failed(options, f"{_refusal(error, user)},") from error
    except AnswerError as error:
        raise _failed(
            options, f"the hub's answer cannot be interpreted ({error}); uploaded files stay: push again,"
        ) from error
    except OSError as error:
        raise _failed(
            options, f"broke off ({first_line(error)}); uploaded files stay: push again,"
        ) from error


def _failed(options: PushOptions, reason: str) -> UserError:
    return user_error("repo", options.repo, f"{reason} {LOCALLY}")


def _refusal(error: Any, user: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "the hub rejects your token: run hf auth login"
    if status == 403:
        return f"is not writable for user {user}"
    return f"the hub answered {status}: {first_line(error)}; uploaded files stay, push again"


def _send_all(api: Any, repositories: Sequence[Repository], options: PushOptions) -> None:
    for repository in repositories:  # before anything is sent
        private = _is_private(api, repository.name)
        check_visibility(repository.name, private, options.public)
        if private and options.public:
            hint = "its settings on the hub make it public, --public does not"
            logger.warning(f"{repository.name} exists and stays private: {hint}")
    collection = _collection(api, options) if options.repo_per_adapter else None
    with ProgressBar("push", len(repositories)) as bar:
        for done, repository in enumerate(repositories, start=1):
            print_plain(_create(api, repository, options))
            bar.update(done)
            if done < len(repositories):
                time.sleep(options.pause)
    if collection is not None:
        print_plain(_collect(api, collection, repositories))


def _create(api: Any, repository: Repository, options: PushOptions) -> str:
    """Create a repository if there is none, and commit the files that it lacks; returns its address."""
    from huggingface_hub import CommitOperationAdd

    present = _adapters_on_hub(api, repository)
    _check_compatible(repository, present)
    address = with_retries(
        lambda: str(api.create_repo(repository.name, private=not options.public, exist_ok=True))
    )
    private = _is_private(api, repository.name)  # another process may have created it
    check_visibility(repository.name, private, options.public)
    files: dict[str, Path | bytes] = {**repository.files, **repository.overview(present)}
    message = f"Adapters of flora_train: {', '.join(repository.adapters)}"[:MESSAGE_LENGTH]

    def commit() -> Any:
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        return api.create_commit(repository.name, operations, commit_message=message)

    with_retries(commit)
    return address


def _check_compatible(repository: Repository, present: Entries) -> None:
    """Raises UserError where the repository has adapters of another base, or of another run under the same
    name."""
    other_bases = {entry.base for entry in present.values()} - {repository.base}
    if other_bases:
        hint = f"holds adapters for another base, {other_bases.pop()}: choose another repository"
        raise user_error("repo", repository.name, hint)
    for name, entry in repository.adapters.items():
        if name in present and present[name].run != entry.run:
            advice = "choose another repository, or rename the task or adapter"
            hint = f"has an adapter {name} of another run: {advice}"
            raise user_error("repo", repository.name, hint)


def _is_private(api: Any, name: str) -> bool | None:
    """Whether a repository is private; None if there is none."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def ask() -> bool | None:
        try:
            private = api.repo_info(name).private
        except GatedRepoError:  # its existence is public
            return False
        except RepositoryNotFoundError:
            return None
        if not isinstance(private, bool):
            raise TypeError(f"{name} is private: {private!r}")
        return private

    return with_retries(ask)


def check_visibility(name: str, private: bool | None, public: bool) -> None:
    """Raises UserError if a repository is public and --public was not given. private: None if there is no
    repository."""
    if private is False and not public:
        hint = "exists and is public: give --public to publish the adapters, or choose another repository"
        raise user_error("repo", name, hint)


def _adapters_on_hub(api: Any, repository: Repository) -> Entries:
    """Adapters that the repository has. Raises UserError for a repository that holds something else."""
    if not with_retries(lambda: api.repo_exists(repository.name)):
        return {}
    files = with_retries(lambda: {str(file) for file in api.list_repo_files(repository.name)}) - {
        ".gitattributes"
    }
    if MANIFEST in files:
        file = with_retries(lambda: Path(api.hf_hub_download(repository.name, MANIFEST)))
        try:
            return read_entries(file.read_bytes())
        except (ValueError, RecursionError) as error:
            hint = (
                f"has a {MANIFEST} of another version: choose another repository, or delete that file there"
            )
            raise user_error("repo", repository.name, hint) from error
    if files:
        raise user_error(
            "repo", repository.name, f"exists, and holds something else ({min(files)}): choose another name"
        )
    return {}


def _collection(api: Any, options: PushOptions) -> Any:
    """The collection of the repositories, created if there is none. Raises UserError if it is public without
    --public."""
    owner, _, name = options.repo.partition("/")
    private = not options.public
    collection = with_retries(
        lambda: api.create_collection(name, namespace=owner, private=private, exists_ok=True)
    )
    if not isinstance(collection.slug, str) or not isinstance(collection.private, bool | None):
        raise AnswerError(f"a collection {collection.slug!r}")
    if not collection.private and not options.public:
        hint = "the collection of this name exists and is public: give --public, or choose another name"
        raise user_error("repo", options.repo, hint)
    return collection


def _collect(api: Any, collection: Any, repositories: Sequence[Repository]) -> str:
    """Add the repositories to their collection; returns its address."""
    for repository in repositories:
        add = partial(api.add_collection_item, collection.slug, repository.name, "model", exists_ok=True)
        with_retries(add)
    return str(collection.url)
