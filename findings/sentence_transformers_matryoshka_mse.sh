#!/usr/bin/env bash
# sentence-transformers' MatryoshkaLoss around MSELoss has no zero at a student that equals its teacher.
#
# Believed: MatryoshkaLoss(model, MSELoss(model), dims) compares the first d entries of the student's embedding with the
# first d of the teacher's, so that a student that equals its teacher has loss 0.
# Really, in sentence-transformers 6.2.0: the student's first d entries are normalised to length 1, the label's are only
# cut, so that a model that reproduces its teacher's embeddings of length 1 has a loss and a gradient at every d below the
# whole width. Labels that are cut and normalised by hand for one d have none. Source: shrink and MSELoss.forward.
# Date: 2026-11-30
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0 sentence-transformers==6.2.0 2> /dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - "$folder" << 'PYTHON'
import sys
import warnings
from importlib.metadata import version

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MSELoss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

warnings.simplefilter("ignore")
print("sentence-transformers", version("sentence-transformers"), "torch", torch.__version__)
words = "[PAD] [UNK] red blue green fish bird tree".split()
plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 16}
folder = sys.argv[1] + "/model"
PreTrainedTokenizerFast(tokenizer_object=plain, **names).save_pretrained(folder)
torch.manual_seed(0)
sizes = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BertModel(BertConfig(intermediate_size=32, max_position_embeddings=16, **sizes)).save_pretrained(folder)
model = SentenceTransformer(folder, device="cpu").eval()
texts = ["red fish", "blue bird", "green tree"]
own = torch.nn.functional.normalize(model.encode(texts, convert_to_tensor=True), dim=-1)


def loss(width, labels):
    with torch.no_grad():
        return MatryoshkaLoss(model, MSELoss(model), [width])([model.preprocess(texts)], labels).item()


whole, cut = loss(16, own), {d: loss(d, own) for d in (8, 4)}
alike = loss(8, torch.nn.functional.normalize(own[:, :8], dim=-1))
print(f"a model with its own embeddings of length 1 for labels, at 16 of 16 entries: {whole:.2e}")
print(", ".join(f"at {d}: {x:.2e}" for d, x in cut.items()), f"; at 8 with labels cut and normalised by hand: {alike:.2e}")
sys.exit(not (whole < 1e-12 and alike < 1e-12 and min(cut.values()) > 1e-3))
PYTHON
