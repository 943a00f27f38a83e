"""The public API is what tests/data/api.txt says (tests/api.py writes it), and importing it reaches for nothing else."""

from __future__ import annotations

import difflib
import subprocess
import sys

import api


def test_the_public_api_is_the_one_recorded() -> None:
    """A change shows here and in the difference of the file: CHANGELOG.md says it, and docs/reliability.md what may."""
    before, now = api.FILE.read_text(encoding="utf-8").splitlines(), api.recorded().splitlines()
    changed = [line for line in difflib.unified_diff(before, now, lineterm="", n=0) if line[:3] not in ("---", "+++")]
    assert not changed, "\n".join([*changed, "python tests/api.py records the change"])


def test_a_changed_default_shows() -> None:
    def loss(student: object, *, temperature: float = 1.0) -> None: ...

    def other(student: object, *, temperature: float = 2.0) -> None: ...

    assert api._arguments(loss) == "(student, *, temperature=1.0)" != api._arguments(other)


# In a process of its own, which says what it opens and what it has imported.
IMPORT = """
import sys
opened = []
def hook(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        opened.append((event, str(arguments[-1])))
    if event in ("subprocess.Popen", "os.system", "os.exec", "urllib.Request"):
        opened.append((event, str(arguments[0])))
sys.addaudithook(hook)
import fastdistil
for name in {*fastdistil.__all__} - {"capture", "tokenizer_projection"}:  # which are of transformers
    getattr(fastdistil, name)
import torch
loss = fastdistil.logit_loss(torch.ones(2, 5), torch.zeros(2, 5))
print(sorted({"transformers", "huggingface_hub", "datasets", "requests", "httpx"} & set(sys.modules)), opened)
"""


def test_an_import_opens_no_socket_and_brings_no_hub() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[] []"], done.stdout + done.stderr[-2000:]


def test_the_hook_sees_a_connection() -> None:
    call = (
        IMPORT.partition("import fastdistil")[0]
        + "import socket\nsocket.socket().connect_ex(('127.0.0.1', 9))\nprint(opened)"
    )
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=60)
    assert "socket.connect" in done.stdout, done.stderr
