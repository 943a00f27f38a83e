"""What a stage shows while it trains (train.py), and how Ctrl-C ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_EVERY = 0.5  # seconds between two looks at the figures


class Progress:
    """A bar with losses, tokens per second and the time left; none where nobody looks (no terminal, not the main
    process)."""

    def __init__(self, name: str, steps: int, start: int, main: bool) -> None:
        self.bar = tqdm(
            total=steps, initial=start, desc=name, unit="step", disable=None if main else True, leave=False,
            dynamic_ncols=True,
        )  # fmt: skip
        self.tokens, self.last = 0, 0.0
        self.started = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        """Of all processes since this call began, without padding; 0 where batches have no tokens."""
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)

    def step(self, losses: Mapping[str, float], tokens: int) -> None:
        self.tokens += tokens
        now = time.perf_counter()
        if now - self.last >= _EVERY or self.bar.n + 1 == self.bar.total:
            self.last = now
            shown = {name: f"{value:.4g}" for name, value in losses.items()}
            if self.tokens:
                shown["tokens/s"] = tqdm.format_sizeof(self.tokens_per_second)
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def note(self, text: str) -> None:
        """What goes on beside the steps, as an evaluation; "" when it is over."""
        self.bar.set_postfix_str(text)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step ends and is saved; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(signum: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
