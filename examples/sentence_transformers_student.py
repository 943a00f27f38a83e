"""A small sentence encoder learns another one's embeddings: python examples/sentence_transformers_student.py [steps]

Needs the integrations extra. Nothing is loaded: both models are small and random, the tokens are words. For real ones
put SentenceTransformer("a name") in their place; where the tokenizers differ, pass the teacher's embeddings as labels.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fastdistil.integrations.sentence_transformers import EmbeddingLoss

WORDS = ["a", "the", "cat", "dog", "bird", "sat", "ran", "sang", "on", "under", "mat", "tree", "red", "blue", "old"]


def encoder(folder: Path, width: int, layers: int) -> SentenceTransformer:
    inner = Tokenizer(models.WordLevel({x: i for i, x in enumerate(["[PAD]", "[UNK]", *WORDS])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(WORDS) + 2, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")  # with mean pooling, as it has no configuration of its own


def sentences(count: int) -> list[str]:
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (6,)).tolist()) for _ in range(count)]


def main(steps: int = 60) -> tuple[float, float]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, student = encoder(folder / "teacher", 64, 2), encoder(folder / "student", 32, 1)
        # The first 16, 32 and all 64 of the teacher's entries (Matryoshka), from a projection of the student's 32.
        loss = EmbeddingLoss(student, kind="cosine", teacher=teacher, projection_dim=64, prefixes=[16, 32, 64])
        held_out = sentences(32)

        def distance() -> float:
            with torch.no_grad():
                return loss.eval()([student.preprocess(held_out)]).item() / 3

        before = distance()
        arguments = SentenceTransformerTrainingArguments(
            name, max_steps=steps, per_device_train_batch_size=16, learning_rate=5e-3, report_to="none",
            save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        rows = Dataset.from_dict({"text": sentences(256)})
        SentenceTransformerTrainer(student, arguments, rows, loss=loss).train()
        after = distance()
    print(f"1 - cos(student, teacher) on held-out sentences: {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
