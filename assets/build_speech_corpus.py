"""Builds `<language>.{train,validation,test}.jsonl` and clips: human speech from Debian packages.

    python assets/build_speech_corpus.py --languages cs nl ro bg --output assets/speech_local

Clips are copied as they are (ogg), or unpacked to flac where few programs read them (G.722). No sentence and
no scene is in two splits; what is left out is counted. Licences are copyleft, so nothing of it is shipped:
NOTICE.md in the output names them. The same package versions give the same splits.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from code_corpus.debian import CorpusError, unpack
from pypi_model import BuildError, check_installed
from speech_corpus import asterisk, fillets, tuxpaint
from speech_corpus.recording import Recording, plausible, same

DEFAULT_OUTPUT = Path(__file__).resolve().parent / "speech_local"
SOURCES: tuple[Any, ...] = (fillets, asterisk, tuxpaint)
LANGUAGES = sorted({language for source in SOURCES for language in source.LANGUAGES})
SHARES = {"test": 0.15, "validation": 0.05}
LONGEST = 30.0


def split_of(scene: str) -> str:
    """The split of a scene: by its hash, so that it depends on nothing else."""
    place = int(sha256(scene.encode()).hexdigest()[:8], 16) / 16**8
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def divided(
    recordings: Iterable[tuple[Recording, float]], dropped: Counter[str]
) -> dict[str, list[tuple[Recording, float]]]:
    """Recordings by split. A sentence stays in the first of test, validation and train that has it."""
    by_split: dict[str, list[tuple[Recording, float]]] = defaultdict(list)
    for recording, seconds in recordings:
        by_split[split_of(f"{recording.source} {recording.language} {recording.scene}")].append(
            (recording, seconds)
        )
    taken: set[str] = set()
    for split in ("test", "validation", "train"):
        kept = [(r, s) for r, s in by_split[split] if same(r.sentence) not in taken]
        dropped["sentence is in another split"] += len(by_split[split]) - len(kept)
        taken |= {same(r.sentence) for r, _ in kept}
        by_split[split] = kept
    return by_split


def usable(
    recordings: Iterable[Recording], clips: Path, dropped: Counter[str]
) -> list[tuple[Recording, float]]:
    """Recordings whose clip, put into `clips`, can be heard and may say what its transcript says; with their
    seconds."""
    import soundfile

    found = []
    for recording in recordings:
        target = clips / f"{recording.source.lower().replace(' ', '-')}-{_name(recording.file)}"
        try:
            seconds = _put(recording.file, target)
        except (soundfile.LibsndfileError, RuntimeError, ValueError):
            dropped["clip cannot be read"] += 1
            continue
        if seconds > LONGEST:
            dropped[f"longer than {LONGEST:.0f} s"] += 1
        elif not plausible(recording.sentence, seconds):
            dropped["transcript too long or too short for its clip"] += 1
        else:
            found.append((Recording(**{**vars(recording), "file": target}), seconds))
            continue
        target.unlink(missing_ok=True)
    return found


def _name(file: Path) -> str:
    """A name that no other clip of its source has."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(file.with_suffix("").parts[-3:]))
    return f"{words}.{'flac' if file.suffix == '.g722' else file.suffix[1:]}"


def _put(file: Path, target: Path) -> float:
    """Copy or unpack a clip; returns its seconds."""
    import soundfile

    if file.suffix != ".g722":
        shutil.copyfile(file, target)
        return float(soundfile.info(target).duration)
    import av

    with av.open(str(file)) as content:
        frames = [frame.to_ndarray().reshape(-1) for frame in content.decode(audio=0)]
        rate = content.streams.audio[0].rate
    samples = [sample for frame in frames for sample in frame]
    if not samples:
        raise ValueError("no samples")
    soundfile.write(target, samples, rate, format="FLAC", subtype="PCM_16")
    return len(samples) / rate


def build_language(language: str, output: Path, packages: Path) -> Counter[str]:
    """Write one language's splits and clips; returns what was left out, by reason."""
    dropped: Counter[str] = Counter()
    found: list[tuple[Recording, float]] = []
    clips = output / "clips" / language
    clips.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        if language not in source.LANGUAGES:
            continue
        roots, versions = {}, {}
        for package in source.packages(language):
            archive, roots[package] = unpack(package, packages)
            versions[package] = archive.name.split("_")[1]
            licences = output / "licenses"
            licences.mkdir(exist_ok=True)
            shutil.copyfile(
                roots[package] / f"usr/share/doc/{package}/copyright", licences / f"{package}.txt"
            )
        found += usable(source.recordings(language, roots, versions), clips, dropped)
    for split, members in divided(found, dropped).items():
        lines = [
            json.dumps(
                {
                    "path": r.file.relative_to(output).as_posix(),
                    "sentence": r.sentence,
                    "speaker": r.speaker,
                    "seconds": round(seconds, 3),
                    "source": r.source,
                    "package": r.package,
                    "version": r.version,
                    "license": r.licence,
                },
                ensure_ascii=False,
            )
            for r, seconds in members
        ]
        (output / f"{language}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        minutes = sum(seconds for _, seconds in members) / 60
        print(f"{language} {split}: {len(members)} clips, {minutes:.1f} minutes")
    return dropped


def build(languages: Sequence[str], output: Path) -> None:
    """Build the corpus folder, whole or not at all. Raises CorpusError if the folder holds anything that an
    earlier build did not write."""
    check_ours(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        packages, finished = Path(scratch) / "packages", Path(scratch) / "finished"
        packages.mkdir()
        finished.mkdir()
        for language in languages:
            dropped = build_language(language, finished, packages)
            print(
                f"{language} left out: "
                + (", ".join(f"{n} {reason}" for reason, n in dropped.items() if n) or "nothing")
            )
        (finished / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
        files = [
            path.relative_to(finished).as_posix() for path in sorted(finished.rglob("*")) if path.is_file()
        ]
        (finished / MANIFEST_NAME).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
        check_ours(output)
        if output.exists():
            shutil.rmtree(output)
        finished.rename(output)


def check_ours(output: Path) -> None:
    """Raises CorpusError if the folder holds a file that its manifest does not name: it is not deleted."""
    if not output.exists() and not output.is_symlink():
        return
    try:
        ours = set(json.loads((output / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]) | {
            MANIFEST_NAME
        }
    except (OSError, ValueError, LookupError, TypeError):
        ours = set()
    found = [
        path.relative_to(output).as_posix()
        for path in sorted(output.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    ]
    if output.is_symlink() or not output.is_dir() or not ours.issuperset(found):
        other = next((name for name in found if name not in ours), "no corpus")
        raise CorpusError(
            f"{output} holds {other}, which was not built here: choose another --output, or delete it by hand"
        )


MANIFEST_NAME = "manifest.json"
"""Names every file of a built corpus."""


NOTICE = """\
# Speech with transcripts from Debian packages

Every line of the manifests says its package, version and licence; the packages' copyright files are in \
`licenses/`.

- Fish Fillets NG (fillets-ng-data-*): GPL-2+, acted voices of a game.
- Asterisk core sounds (asterisk-core-sounds-*-g722): CC-BY-SA-3.0 (see the file for each language), one \
speaker each.
- Tux Paint stamps (tuxpaint-stamps-default): GPL-2+.

Changes: G.722 was decoded to FLAC; transcripts have single spaces. Do not ship these files with code under \
another licence.
"""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=LANGUAGES)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    options = parser.parse_args()
    try:
        check_installed(("soundfile", "av"))
        build(options.languages, options.output)
    except (BuildError, CorpusError) as error:
        print(f"build_speech_corpus: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
