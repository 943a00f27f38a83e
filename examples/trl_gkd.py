"""GKD with TRL's trainer and our loss: python examples/trl_gkd.py [steps]

Needs the integrations extra. Nothing is loaded: both models are small and random, the tokens are bytes. For real ones
put AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained in their place; nothing else changes.
"""

from __future__ import annotations

import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

import fastdistil as fd
from fastdistil.integrations.trl import GKDMixin

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
CHATS = [("name a colour", "blue"), ("two and two", "four"), ("say hello", "hello"), ("a fruit", "an apple")]


class Trainer(GKDMixin, GKDTrainer):
    """All there is to it: TRL's trainer with the loss of the mixin."""


def bytes_as_tokens() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({x: i for i, x in enumerate([*SPECIAL, *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(SPECIAL)
    found = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    found.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return found


def causal(width: int, layers: int) -> LlamaForCausalLM:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * width, "vocab_size": 261}
    more = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, num_hidden_layers=layers, **shape, **more))


def divergence(student: LlamaForCausalLM, teacher: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """KL(teacher || student) per token, in nats."""
    ids = ids.to(student.device)
    with torch.no_grad():
        return fd.logit_loss(student.eval()(ids).logits, teacher.eval()(ids).logits).item()


def main(steps: int = 30) -> tuple[float, float]:
    torch.manual_seed(0)
    teacher, student, tokenizer = causal(64, 2), causal(32, 1), bytes_as_tokens()
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in CHATS * 8]
    held_out = tokenizer("<user>another colour<eos><assistant>red<eos>", return_tensors="pt").input_ids
    before = divergence(student, teacher, held_out)
    with tempfile.TemporaryDirectory() as out:
        arguments = GKDConfig(
            out, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, lmbda=0.5, beta=0.5,
            max_new_tokens=8, temperature=1.0, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False,
        )  # fmt: skip
        rows = Dataset.from_dict({"messages": chats})
        Trainer(student, teacher, arguments, train_dataset=rows, processing_class=tokenizer).train()
    after = divergence(student, teacher, held_out)
    print(f"KL(teacher || student) on held-out text: {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
