"""Runs commands of fastdistil one after the other, for torchrun: their processes import transformers once.

torchrun --nproc-per-node 2 each_system.py COMMANDS.json    a list of lists of arguments
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from fastdistil.cli import main

for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    sys.argv = ["fastdistil", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    PartialState().wait_for_everyone()  # the next one reads what the first process still writes
