"""Fetches and unpacks Debian packages (`apt-get download`, `dpkg-deb -x`); nothing is installed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from .licences import CopyrightFile, parse_copyright
from .sources import SKIPPED_FOLDERS

MAXIMUM_FILE_BYTES = 400_000


class CorpusError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


@dataclass(frozen=True)
class Package:
    """An unpacked package."""

    name: str
    version: str
    source_package: str
    homepage: str
    root: Path
    copyright_text: str
    copyright: CopyrightFile

    def files(self, suffixes: tuple[str, ...], under: str = "") -> list[tuple[str, str]]:
        """(path inside the package, text) of its real source files, sorted; undecodable ones are left out."""
        found = []
        for file in sorted(self.root.rglob("*")):
            path = file.relative_to(self.root).as_posix()
            if (
                not path.endswith(suffixes)
                or not path.startswith(under)
                or file.is_symlink()
                or not file.is_file()
            ):
                continue
            folders = path.lower().split("/")[:-1]
            # `usr/share/doc/...` holds examples, `.../site.t/` and the like are tests
            if SKIPPED_FOLDERS & set(folders) or file.stat().st_size > MAXIMUM_FILE_BYTES:
                continue
            try:
                found.append((path, file.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue
        return found


def unpack(name: str, folder: Path) -> tuple[Path, Path]:
    """Download `name` into `folder` (unless it is there) and unpack it; returns the .deb and the root."""
    archive = _archive(name, folder)
    if archive is None:
        _run(
            ["apt-get", "download", name], folder, f"apt-get could not download {name}; run `apt-get update`"
        )
        archive = _archive(name, folder)
    if archive is None:
        raise CorpusError(f"apt-get download {name} left no {name}_*.deb")
    root = folder / "unpacked" / archive.stem
    if not root.exists():
        # renamed when complete, so that an interrupted run is not mistaken for a finished one
        partial = root.with_name(root.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        _run(["dpkg-deb", "-x", str(archive), str(partial)], folder, f"could not unpack {archive.name}")
        partial.rename(root)
    return archive, root


def fetch(name: str, folder: Path) -> Package:
    """The package `name`, unpacked below `folder`, its licences read (CorpusError when they cannot be)."""
    archive, root = unpack(name, folder)
    version, source, homepage = (_field(archive, field) for field in ("Version", "Source", "Homepage"))
    copyright_file = root / "usr/share/doc" / name / "copyright"
    if not copyright_file.is_file():
        raise CorpusError(f"{name} {version} has no /usr/share/doc/{name}/copyright of its own; leave it out")
    text = copyright_file.read_text(encoding="utf-8", errors="replace")
    parsed = parse_copyright(text)
    if parsed is None:
        raise CorpusError(
            f"the copyright file of {name} {version} is not machine-readable (DEP-5); leave it out"
        )
    source_package = source.split()[0] if source else name
    return Package(name, version, source_package, homepage, root, text, parsed)


def _archive(name: str, folder: Path) -> Path | None:
    """The newest-named .deb of `name` in `folder`."""
    return max(folder.glob(f"{name}_*.deb"), default=None)


def _field(archive: Path, field: str) -> str:
    """One control field of a .deb, empty when it is absent."""
    command = ["dpkg-deb", "-f", str(archive), field]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _run(command: list[str], folder: Path, complaint: str) -> None:
    try:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CorpusError(f"{command[0]} was not found: the corpus is built on Debian or Ubuntu") from None
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines() or ["no message"]
        raise CorpusError(f"{complaint} ({lines[-1]})")
