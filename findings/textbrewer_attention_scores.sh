#!/usr/bin/env bash
# TextBrewer's att_mse_loss drops negative attention scores where it gets no mask.
#
# Believed: att_mse_loss(S, T) is the mean squared difference of two arrays of scores before the softmax, and a mask of
# ones changes nothing.
# Really, in textbrewer 0.2.1.post1: without a mask every score of -0.001 and less is set to 0 on both sides first, so that
# scores of -1 and -5 have a loss of 0; with a mask of ones they stay and the value is the mean square. Half of ordinary
# scores are negative: of normal ones 0.38 of the mean square is left. Without padding pass a mask of ones.
# Date: 2026-11-30
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy textbrewer==0.2.1.post1 2> /dev/null
"$folder/venv/bin/python" - << 'PYTHON'
import sys
from importlib.metadata import version

import torch
from textbrewer.losses import att_mse_loss

print("torch", torch.__version__, "textbrewer", version("textbrewer"))
batch, heads, length = 2, 12, 5
mask = torch.ones(batch, length)
negative, lower = (torch.full((batch, heads, length, length), x) for x in (-1.0, -5.0))
dropped, kept = att_mse_loss(negative, lower).item(), att_mse_loss(negative, lower, mask).item()
print(f"scores of -1 against -5: mean square 16, without a mask {dropped:g}, with a mask of ones {kept:g}")
draw = torch.Generator().manual_seed(0)
student, teacher = (torch.randn(batch, heads, length, length, generator=draw) for _ in range(2))
mean = (student - teacher).square().mean().item()
plain, masked = att_mse_loss(student, teacher).item() / mean, att_mse_loss(student, teacher, mask).item() / mean
print(f"normal scores: without a mask {plain:.3f} of the mean square, with a mask of ones {masked:.3f}")
sys.exit(not (dropped == 0 and kept == 16 and plain < 0.9 and abs(masked - 1) < 1e-4))
PYTHON
