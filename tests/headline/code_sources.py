"""Real source code of the recipe's nine languages, from the repository, the machine or package registries.

Nothing of it is committed: packages are read where they are installed, or downloaded with their ordinary
clients (apt-get, npm, pip). Each language has alternatives, of which the first that works is used.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE = 400_000
"""Bytes of a file that is read; longer ones are generated code in most packages."""
SECONDS = 60
"""Time limit of a download."""

DEPARSE = """
for (package in c("tools", "utils", "stats")) for (name in sort(ls(asNamespace(package)))) {
  value <- get(name, asNamespace(package))
  if (is.function(value) && !is.primitive(value)) {
    cat("\\001", package, "/", name, "\\n", sep = "")
    cat(paste(name, "<-"), deparse(value), "", sep = "\\n")
  }
}
"""
"""Prints the functions of R's own packages, whose source files are not installed."""


class NoSourceError(Exception):
    """Why a source has no code here."""


@dataclass(frozen=True)
class SourceFile:
    """A file of source code."""

    repository: str
    """Name of the package that it comes from."""
    path: str
    license: str
    text: str


@dataclass(frozen=True)
class Source:
    """A place where the code of a language comes from."""

    name: str
    license: str
    read: Callable[[Path], Iterable[tuple[str, bytes]]]
    """Folder for downloads -> path and content of each file. Raises NoSourceError."""

    def files(self, downloads: Path) -> list[SourceFile]:
        """The files that are text, sorted. Raises NoSourceError if there are none."""
        files = []
        for path, content in sorted(self.read(downloads)):
            if len(content) > LONGEST_FILE:
                continue
            text = content.decode(errors="replace")
            files.append(SourceFile(self.name, path, self.license, text))
        if not files:
            raise NoSourceError(f"{self.name} has no source files")
        return files


def collect(language: str, downloads: Path) -> tuple[list[SourceFile], list[str]]:
    """The files of a language, and why some of its sources are not used here."""
    reasons: list[str] = []
    for alternative in SOURCES[language]:
        files: list[SourceFile] = []
        try:
            for source in alternative:
                files += source.files(downloads)
        except NoSourceError as error:
            reasons.append(str(error))
            continue
        return files, reasons
    return [], reasons


def committed(language: str) -> Source:
    """The functions and files of assets/code, which are excerpts from Debian packages."""

    def read(downloads: Path) -> Iterable[tuple[str, bytes]]:
        for split in ("train", "validation"):
            file = ROOT / "assets" / "code" / f"{language}.{split}.jsonl"
            for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")):
                if line:
                    row = json.loads(line)
                    text = row["prompt"] + row["completion"] + "\n"
                    yield f"{row['package']}/{split}/{number:05}", text.encode()

    return Source(f"assets/code ({language})", "see assets/code/NOTICE.md", read)


def installed(folder: str, suffix: str, license: str) -> Source:
    """The files of an installed package."""

    def read(downloads: Path) -> Iterable[tuple[str, bytes]]:
        root = Path(folder)
        if not root.is_dir():
            raise NoSourceError(f"{folder} is not installed")
        for path in root.rglob(f"*{suffix}"):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix(), path.read_bytes()

    return Source(folder.strip("/").replace("/", "-"), license, read)


def debian(package: str, suffix: str, license: str) -> Source:
    """The files of a Debian package, which is downloaded and unpacked, not installed."""

    def read(downloads: Path) -> Iterable[tuple[str, bytes]]:
        unpacked = downloads / package
        if not unpacked.is_dir():
            _run(["apt-get", "download", package], downloads)
            archive = max(downloads.glob(f"{package}_*.deb"), default=None)
            if archive is None:
                raise NoSourceError(f"apt-get download {package} left no file")
            partial = downloads / f"{package}.partial"
            _run(["dpkg-deb", "-x", str(archive), str(partial)], downloads)
            partial.rename(unpacked)
        for path in unpacked.rglob(f"*{suffix}"):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(unpacked).as_posix(), path.read_bytes()

    return Source(f"debian-{package}", license, read)


def npm(package: str, suffix: str, license: str) -> Source:
    """The files of an npm package."""
    name = package.rpartition("@")[0]

    def read(downloads: Path) -> Iterable[tuple[str, bytes]]:
        pattern = f"{name.removeprefix('@').replace('/', '-')}-*.tgz"
        if not list(downloads.glob(pattern)):
            _run(["npm", "pack", package, "--silent"], downloads)
        with tarfile.open(max(downloads.glob(pattern))) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(suffix):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield member.name, content.read()

    return Source(f"npm-{name}", license, read)


def pypi(requirement: str, suffix: str, license: str) -> Source:
    """The files of a wheel on PyPI."""
    name = requirement.partition("==")[0]

    def read(downloads: Path) -> Iterable[tuple[str, bytes]]:
        pattern = f"{name.replace('-', '_')}-*.whl"
        if not list(downloads.glob(pattern)):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            _run([*pip, "--dest", ".", requirement], downloads)
        with zipfile.ZipFile(max(downloads.glob(pattern))) as archive:
            for member in archive.namelist():
                if member.endswith(suffix):
                    yield member, archive.read(member)

    return Source(f"pypi-{name}", license, read)


def deparsed() -> Source:
    """Functions of R's own packages."""

    def read(downloads: Path) -> Iterable[tuple[str, bytes]]:
        if shutil.which("Rscript") is None:
            raise NoSourceError("Rscript is not installed")
        printed = _run(["Rscript", "--vanilla", "-e", DEPARSE], downloads)
        for function in printed.split("\x01")[1:]:
            path, _, text = function.partition("\n")
            yield f"{path}.R", text.encode()

    return Source("r-base", "GPL-2+", read)


def solutions(key: str) -> list[SourceFile]:
    """The toolchain's probe programs and the solutions of the starter problems: a little code in each
    language, by its key in eval/languages.yaml."""
    table = yaml.safe_load((ROOT / "eval" / "languages.yaml").read_text(encoding="utf-8"))[key]
    texts = {name: table[name] for name in ("pass", "fail")}
    file = ROOT / "tests" / "fixtures" / "starter_solutions" / f"{key}.yaml"
    if file.exists():
        texts |= yaml.safe_load(file.read_text(encoding="utf-8"))["correct"]
    return [SourceFile("flora_train", name, "Apache-2.0", f"{text}\n") for name, text in texts.items()]


def _run(command: Sequence[str], folder: Path) -> str:
    """Standard output of a command. Raises NoSourceError with its last line."""
    try:
        ended = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoSourceError(f"{command[0]}: {error}") from None
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines() or ["no message"]
        raise NoSourceError(f"{' '.join(command[:3])}: {lines[-1]}")
    return ended.stdout


PHOBOS = "Boost"
SOURCES: dict[str, tuple[tuple[Source, ...], ...]] = {
    "d": (
        (installed("/usr/lib/ldc/x86_64-linux-gnu/include/d", ".d", PHOBOS),),
        (debian("libphobos2-ldc-shared-dev", ".d", PHOBOS),),
    ),
    "julia": (
        (pypi("julia==0.6.2", ".jl", "MIT"), pypi("centrex-tlf-julia-extension==0.4.3", ".jl", "MIT")),
    ),
    "lua": ((committed("lua"),),),
    "perl": ((committed("perl"),),),
    "r": ((deparsed(),),),
    "racket": (
        (installed("/usr/share/racket/collects", ".rkt", "MIT or Apache-2.0"),),
        (debian("racket-common", ".rkt", "MIT or Apache-2.0"),),
    ),
    "ruby": ((committed("ruby"),),),
    "rust": (
        (
            debian("librust-itertools-dev", ".rs", "MIT or Apache-2.0"),
            debian("librust-regex-dev", ".rs", "MIT or Apache-2.0"),
        ),
    ),
    "swift": ((npm("expo-modules-core@2.5.0", ".swift", "MIT"),),),
}
"""Language -> alternatives, each of which is several sources that are used together."""
