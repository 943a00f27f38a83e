"""Files and folders that are written whole or not at all, by one writer at a time, and errors that name the file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: whoever writes last wins
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()  # descriptors whose locks this process holds


def _forget() -> None:
    """A fork shares the parent's locks, which would then last as long as the child."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails inside is an OSError that names the file; libraries leave it out, or raise kinds of their own."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno or errno.EIO, f"cannot be written: {reason}", os.fspath(path)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError" and not (isinstance(error, RuntimeError) and _of_stream(error)):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(errno.EIO, f"cannot be written: {reason}", os.fspath(path)) from error


def _of_stream(error: RuntimeError) -> bool:
    """torch.save's writer, of a full disk for one."""
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "ostream"))


def _lock(descriptor: int) -> bool:
    """False where another writer has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether what was opened is still what the path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class Folder:
    """Makes its owner the only writer of a folder, until `release`, or the end of the process however it ends.

    Raises RuntimeError where another process, or another object of this one, writes there, and OSError where nobody
    can.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._descriptor = -1
        while self._descriptor < 0:
            path.mkdir(parents=True, exist_ok=True)
            if os.name == "nt":
                return
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # its writer has just put it in place
                continue
            if not _lock(descriptor):
                os.close(descriptor)
                raise RuntimeError(f"{name}: another process writes to {path}, expected one at a time")
            if not _same(descriptor, path):
                os.close(descriptor)
                continue
            self._descriptor = descriptor
            _held.add(descriptor)

    def release(self) -> None:
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` at the end, brought to disk: until then, and after an error, what
    was there stays. Raises RuntimeError where another process writes it, OSError naming `path` where it cannot be
    written."""
    partial = path.with_name(f".{path.name}.partial")
    with naming(path):
        file = _open_alone(path, partial)
    with naming(path), file:  # the lock is given back with the file
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _open_alone(path: Path, partial: Path) -> IO[bytes]:
    while True:
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "wb")
        if not _lock(file.fileno()):
            file.close()
            raise RuntimeError(f"{path}: another process writes it, expected one at a time")
        if _same(file.fileno(), partial):
            file.truncate(0)
            return file
        file.close()  # its writer has just put it in place


@contextlib.contextmanager
def new_folder(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `folder` at the end. Raises as `Folder`."""
    partial = folder.with_name(folder.name + ".partial")
    with naming(folder), Folder(partial, name):
        for left in partial.iterdir():  # of one that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        try:
            yield partial
            # Held until it is gone: under the new folder's name nobody may take it for left behind.
            with Folder(folder, name) if folder.exists() else contextlib.nullcontext():
                _replace_folder(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _replace_folder(partial: Path, folder: Path) -> None:
    """Put the folder `partial` in the place of `folder`, which is there whole at every moment where the system can
    exchange two names; elsewhere it is for an instant at `<folder>.previous`, and called again this puts it back."""
    previous = folder.with_name(folder.name + ".previous")
    if not folder.exists() and previous.exists():
        os.replace(previous, folder)
    if not folder.exists():
        os.replace(partial, folder)
    elif _exchange(partial, folder):
        shutil.rmtree(partial)
    else:
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
        os.replace(partial, folder)
        shutil.rmtree(previous)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2; False where there is none."""
    try:
        call: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return int(call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)) == 0


SUMS = "sha256.json"  # of a saved model's folder: file name to sha256
_TEXTS = (".md",)  # which people write into
_checked: set[tuple[object, ...]] = set()  # what this process has read already


def write_sums(folder: Path) -> None:
    """Leave in the folder what its files hold, for `check_sums`."""
    sums = {path.name: digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != SUMS}
    sums = {name: value for name, value in sums.items() if not name.endswith(_TEXTS)}
    with replacing(folder / SUMS) as file:
        file.write(json.dumps(sums, indent=1).encode() + b"\n")


def check_sums(folder: Path) -> None:
    """Raises ValueError or FileNotFoundError naming the file where one is not what `write_sums` saw; a folder without
    its list is anybody's."""
    path = folder / SUMS
    if not path.is_file():
        return
    try:
        sums = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as a list of checksums: {error}") from error
    now = [(x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in sorted(folder.iterdir())]
    seen = (str(folder.resolve()), *now)
    if seen in _checked:
        return
    for name, wanted in sums.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing, {path} lists it")
        if (found := digest(folder / name)) != wanted:
            raise ValueError(
                f"{folder / name}: altered, its sha256 is {found}, expected {wanted}; where the "
                f"change was meant, delete {path}"
            )
    _checked.add(seen)
