"""Writes tests/data/mistakes.jsonl: the message of every mistake of tests/support/mistakes. Read the difference before
it is committed: `git diff tests/data/mistakes.jsonl`.

    python tests/messages.py [PART OF A NAME] [--show]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT / "support")]

from mistakes import message, mistakes  # noqa: E402


def main() -> None:
    show = "--show" in sys.argv
    wanted = [x for x in sys.argv[1:] if not x.startswith("-")]
    lines = []
    for name, mistake in mistakes().items():
        if wanted and not any(x in name for x in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = message(mistake, Path(folder))
            except AssertionError as error:
                found = f"UNNOTICED: {error}"
        parts = (mistake.argument, mistake.came, mistake.wanted, mistake.out)
        missing = [x for x in parts if x not in found]
        if show or missing:
            print(
                f"{'POOR' if missing else 'ok  '} {name}: {found}",
                f"\n     lacks {missing}" if missing else "",
                flush=True,
            )
        lines.append(json.dumps({"mistake": name, "message": found}, ensure_ascii=False))
    if not wanted and not show:
        (ROOT / "data/mistakes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
