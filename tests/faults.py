"""Damaged, swapped and half-written files, full disks, read-only folders, two writers at once, SIGKILL while writing.

    python tests/faults.py [--share 1.0] [--seed 0] [--page docs/reliability.md]

For each thing that is saved (tests/support/saved_things.py): what loads is what was saved, or an error names the file
and the reason; what was there before a write that fails or is killed is there after it. Writes its rows of the table in
docs/reliability.md; exit code 1 where something was lost. Minutes: `make faults`. `make test` does a hundredth of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parent / "support"))

import torch
from reliability import Row, write_rows
from saved_things import THINGS

NOBODY = 65534


@dataclass
class Count:
    """How often a fault was tried, and what went wrong."""

    tried: int = 0
    lost: int = 0
    first: str = ""

    def add(self, problem: str) -> None:
        self.tried += 1
        if problem:
            self.lost += 1
            self.first = self.first or problem


def loads(thing: Any, folder: Path, good: str, files: list[Path]) -> str:
    """ "" where `folder` loads as `good`, or an error names one of its files or the folder; else what happened."""
    try:
        found = thing.load(folder)
    except (OSError, ValueError) as error:
        message = str(error)
        named = any(path.name in message for path in files)
        return "" if named else f"{type(error).__name__} names no file: {message[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300] + traceback.format_exc()[-600:]
    return "" if found == good else "another thing was loaded"


def header(path: Path) -> int:
    """How many of a file's first bytes are its header."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return min(size, 64)
    with path.open("rb") as file:
        return min(size, 8 + struct.unpack("<Q", file.read(8))[0])


def inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


class Damage:
    """One thing, saved, and copies of it that are damaged and loaded."""

    def __init__(self, thing: Any, folder: Path, generator: random.Random, share: float) -> None:
        self.thing, self.folder, self.generator, self.share = thing, folder, generator, share
        thing.save(folder / "saved", 0)
        thing.save(folder / "other", 1)
        self.good = thing.load(folder / "saved")
        self.files = [path.relative_to(folder / "saved") for path in inside(folder / "saved")]

    def many(self, count: int) -> int:
        return max(1, round(count * self.share))

    def some(self, items: list[Any]) -> list[Any]:
        return sorted(self.generator.sample(items, min(len(items), self.many(len(items)))))

    def check(self, change: Callable[[Path], object], count: Count, *names: Path) -> None:
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.folder / "saved", work)
        before = inside(work)
        change(work)
        count.add(loads(self.thing, work, self.good, before))

    def places(self) -> Iterator[tuple[Path, int]]:
        """Every byte of every header, and 200 random places."""
        for name in self.files:
            for at in self.some(list(range(header(self.folder / "saved" / name)))):
                yield name, at
        for _ in range(self.many(200)):
            name = self.generator.choice(self.files)
            yield name, self.generator.randrange((self.folder / "saved" / name).stat().st_size)

    def truncated(self) -> Count:
        count = Count()
        for name, at in self.places():
            self.check(lambda work, name=name, at=at: os.truncate(work / name, at), count)  # type: ignore[misc]
        return count

    def flipped(self) -> Count:
        count = Count()
        for name, at in self.places():
            bit = 1 << self.generator.randrange(8)

            def flip(work: Path, name: Path = name, at: int = at, bit: int = bit) -> None:
                data = bytearray((work / name).read_bytes())
                data[at] ^= bit
                (work / name).write_bytes(bytes(data))

            self.check(flip, count)
        return count

    def swapped(self) -> Count:
        """Each file in the place of each other one of both folders; and the other's whole folder's file of that name."""
        count = Count()
        sources = [(self.folder / which / name) for which in ("saved", "other") for name in self.files]
        for name in self.files:
            for source in sources:
                if source.is_file() and source != self.folder / "saved" / name and len(self.files) > 1:
                    self.check(lambda work, a=source, b=name: shutil.copyfile(a, work / b), count)  # type: ignore[misc]
        return count


def child(action: Callable[[], object]) -> tuple[int, str]:
    """Runs `action` in a fork; its exit code and error message."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        message, code = "", 0
        try:
            os.close(reading)
            action()
        except BaseException as error:
            message, code = f"{type(error).__name__}: {error}", 1
        os.write(writing, message.encode()[:4000])
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def limited(action: Callable[[], object], size: int) -> Callable[[], object]:
    """No file may grow beyond `size` bytes, as on a disk that is full."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()

    return run


def as_nobody(action: Callable[[], object]) -> Callable[[], object]:
    """The superuser may write everywhere."""

    def run() -> None:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        action()

    return run


def version_of(thing: Any, folder: Path, states: list[str]) -> str:
    """ "" where one of the versions loads."""
    try:
        found = thing.load(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "" if found in states else "another thing was loaded"


def full(thing: Any, folder: Path, count: int, generator: random.Random) -> Count:
    """Over what is there already, and into a new folder, which a second run then completes."""
    found = Count()
    for i in range(count):
        work = folder / f"full-{i}"
        thing.save(work, 0)
        good = thing.load(work)
        largest = max(path.stat().st_size for path in inside(work))
        target, version = (work, 1) if thing.again else (folder / f"new-{i}", 0)
        code, said = child(limited(lambda t=target, v=version: thing.save(t, v), generator.randrange(largest)))  # type: ignore[misc]
        if code != 0 and "cannot be written" not in said:
            found.add(f"the error names neither file nor reason: {said[:300]}")
            continue
        if code == 0 or not thing.again:
            thing.save(target, version)  # there is room again
        found.add(version_of(thing, work, [good] if code else [good, thing.load(work)]))
        if not thing.again:
            found.add(version_of(thing, target, [good]))
        shutil.rmtree(work), shutil.rmtree(target, ignore_errors=True)
    return found


def read_only(thing: Any, folder: Path) -> Count:
    found, work = Count(), folder / "read-only"
    work.mkdir(exist_ok=True)
    if thing.again:
        thing.save(work, 0)
    paths = [work, *(path for path in work.rglob("*"))]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for parent in work.parents:
        if (
            parent.stat().st_uid == os.geteuid()
            and parent.is_relative_to(tempfile.gettempdir())
            and parent != Path(tempfile.gettempdir())
        ):
            parent.chmod(0o755)
    code, said = child(as_nobody(lambda: thing.save(work, 1)))
    named = any(path.name in said for path in paths) and "ermission denied" in said
    found.add("" if code and named else f"exit {code}: {said[:300]}")
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)
    if thing.again:
        found.add(version_of(thing, work, [thing.load(work)]))
    return found


def killed(thing: Any, folder: Path, count: int, generator: random.Random) -> Count:
    """SIGKILL while a child writes; where versions replace each other one of them loads, else the work is continued."""
    found, work = Count(), folder / "killed"
    states = []
    for version in (0, 1) if thing.again else (0,):
        thing.save(folder / f"state-{version}", version)
        states.append(thing.load(folder / f"state-{version}"))
    began = time.perf_counter()
    thing.save(folder / "timed", 0)
    seconds = time.perf_counter() - began
    if thing.again:
        thing.save(work, 0)
    for _ in range(count):
        process = os.fork()
        if process == 0:
            version = 0
            while True:
                version = 1 - version if thing.again else 0
                thing.save(work, version)
                if not thing.again:
                    os._exit(0)
        time.sleep(generator.uniform(0, 2 * seconds if thing.again else seconds))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if thing.again:
            found.add(version_of(thing, work, states))
            continue
        try:
            thing.save(work, 0)
            problem = version_of(thing, work, states)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:300]
        found.add(problem)
        shutil.rmtree(work)
    return found


def two_writers(thing: Any, folder: Path, count: int) -> Count:
    """Children that write the same thing at the same time: each ends, or is refused; then it loads."""
    found = Count()
    for i in range(count):
        work, children = folder / f"two-{i}", []
        for _ in range(2):
            process = os.fork()
            if process == 0:
                try:
                    for _ in range(3 if thing.again else 1):
                        thing.save(work, 0)
                except RuntimeError as error:
                    os._exit(0 if "another process writes" in str(error) else 3)
                except ValueError as error:  # it was complete when the second one came
                    os._exit(0 if "complete" in str(error) else 4)
                except BaseException:
                    traceback.print_exc()
                    os._exit(5)
                os._exit(0)
            children.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
        if any(codes):
            found.add(f"exit codes {codes}")
            continue
        thing.save(folder / "one", 0)
        found.add(version_of(thing, work, [thing.load(folder / "one")]))
        shutil.rmtree(folder / "one"), shutil.rmtree(work)
    return found


def faults(thing: Any, folder: Path, share: float, seed: int) -> Iterator[tuple[str, Count]]:
    """Every fault with one thing."""
    generator = random.Random(f"{thing.name} {seed}")
    damage = Damage(thing, folder, generator, share)
    yield "truncated", damage.truncated()
    yield "one bit flipped", damage.flipped()
    yield "files swapped, or another's", damage.swapped()
    yield "disk full", full(thing, folder, damage.many(20), generator)
    yield "read-only folder", read_only(thing, folder)
    yield "two writers at once", two_writers(thing, folder, damage.many(10))
    yield "SIGKILL while writing", killed(thing, folder, damage.many(50), generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the places and moments that are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="the page whose rows are written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows, lost = list[Row](), 0
    for thing in THINGS:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            for name, count in faults(thing, Path(folder), asked.share, asked.seed):
                print(json.dumps({"thing": thing.name, "fault": name, **vars(count)}), flush=True)
                rows.append(Row(f"{thing.name}: {name}", f"{count.tried:,}", f"{count.lost:,}"))
                lost += count.lost
    if asked.page:
        write_rows(asked.page, "faults", rows)
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
