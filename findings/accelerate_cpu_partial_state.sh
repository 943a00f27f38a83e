#!/usr/bin/env bash
# accelerate's PartialState, made first under torchrun on CPUs, takes every process for the main one and for the only one.
#
# Believed: ACCELERATE_USE_CPU=true is what makes accelerate join the processes that torchrun started on CPUs; it does so
# for `Accelerator()`, and PartialState, which is the documented way to ask "is this the main process?" before there is an
# Accelerator, reads the same variable.
# Really, in accelerate 1.15.0 with torch 2.13.0: `PartialState()` without cpu=True does not read it. Each of two processes
# finds num_processes 1 and is_main_process True, so that both write, and `main_process_first` keeps nobody waiting. The
# state is shared: an `Accelerator()` made afterwards finds one process as well, and both train by themselves, without a
# word. Made the other way round, the Accelerator first, both find two processes.
# What helps: make the Accelerator first, or PartialState(cpu=True) where the variable is set.
# Date: 2026-11-30
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0 numpy 2> /dev/null
cat > "$folder/ask.py" << 'PYTHON'
import os
import sys

import accelerate
import torch
from accelerate import Accelerator, PartialState

first = sys.argv[1]
if first == "state":
    state = PartialState()
    accelerator = Accelerator()
else:
    accelerator = Accelerator()
    state = PartialState()
print(
    accelerate.__version__, torch.__version__, f"first: {first}, rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}:",
    f"PartialState has {state.num_processes}, main: {state.is_main_process}; Accelerator has {accelerator.num_processes}",
    flush=True,
)
PYTHON
export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
for first in state accelerator; do
    "$folder/venv/bin/torchrun" --nproc-per-node 2 --standalone "$folder/ask.py" "$first" 2> /dev/null | tee "$folder/$first"
done
[ "$(grep -c 'PartialState has 1, main: True; Accelerator has 1' "$folder/state")" = 2 ] &&
    [ "$(grep -c 'PartialState has 2, main: .*; Accelerator has 2' "$folder/accelerator")" = 2 ]
