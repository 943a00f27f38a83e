#!/usr/bin/env bash
# Gemma 2 as transformers loads it by default does not cap its attention scores, and nothing says so.
#
# Believed: a model whose configuration has attn_logit_softcapping (Gemma 2: 50) caps its scores under every attention
# implementation, or is given one that can, or warns; so that a teacher's maps and logits are those of its configuration.
# Really, in transformers 5.17.0 with torch 2.13.0: the default implementation is "sdpa", whose function has no softcap
# and drops the argument without a warning. Logits under sdpa are those of eager attention with no cap at all. Under
# "eager" (and in the functions of flash and flex attention) the cap is there. Who distils from such a teacher, or
# compares its maps, wants attn_implementation="eager".
# Date: 2026-11-29
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0 2> /dev/null
"$folder/venv/bin/python" - << 'PYTHON'
import sys
import warnings

import torch
import transformers
from transformers import Gemma2Config, Gemma2ForCausalLM

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=1, attn_logit_softcapping=1.0,
)
model = Gemma2ForCausalLM(config).eval()
default = model.config._attn_implementation
with torch.no_grad():
    for weight in model.parameters():
        weight.mul_(3)  # scores as large as a trained model's
tokens = torch.randint(0, 100, (1, 12))


def logits(implementation: str) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(tokens).logits


with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    capped, by_default = logits("eager"), logits(default)
for layer in model.model.layers:
    layer.self_attn.attn_logit_softcapping = None
uncapped = logits("eager")
cap, rest = ((x - by_default).abs().max().item() for x in (capped, uncapped))
print("transformers", transformers.__version__, "torch", torch.__version__, "default:", default)
print(f"default against eager with the cap: {cap:.1e} off; without it: {rest:.1e}; warnings: {len(heard)}")
sys.exit(0 if default == "sdpa" and cap > 1e-2 and rest < 1e-5 and not heard else 1)
PYTHON
