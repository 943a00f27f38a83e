"""Peak memory of a part of a run."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def anonymous_mib() -> float | None:
    """MiB of this process' own memory now, without pages of mapped files, which the system may drop; None where the
    system does not say (other than Linux)."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) / 1024 if found else None


class PeakMemory:
    """Inside of the `with` block `anonymous_mib` is looked at every `seconds`; `mib` is the most that was seen."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.mib = anonymous_mib()
        self._seconds, self._ended = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        now = anonymous_mib()
        if now is not None and self.mib is not None:
            self.mib = max(self.mib, now)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
