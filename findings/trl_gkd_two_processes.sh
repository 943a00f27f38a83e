#!/usr/bin/env bash
# TRL's GKDTrainer gets half of the gradient on two processes.
#
# Believed: the same four examples, as one batch of four on one process or as two of two on two, give one gradient:
# transformers' Trainer counts num_items_in_batch over all processes, and what averages gradients over processes is undone.
# Really, in trl 1.16.0 with transformers 5.17.0: GKDTrainer.compute_loss divides by the count over all processes, and the
# factor that undoes the average is in Trainer.compute_loss, which it overrides. On N processes the update is 1/N as large
# as on one: with SGD a learning rate that means another thing; with Adam only clipping and epsilon see it. TRL's newer
# DistillationTrainer has the factor.
# Date: 2026-11-30
#
# Exits 0 while it is so, 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.17.0 accelerate==1.15.0 trl==1.16.0 2> /dev/null
cat > "$folder/step.py" << 'PYTHON'
import os
import sys
import warnings
from importlib.metadata import version

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

warnings.simplefilter("ignore")
processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
inner = Tokenizer(models.BPE({x: i for i, x in enumerate(["<pad>", "<eos>", *letters])}, []))
inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", model_max_length=64)
tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=0, **sizes))


chat = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
student = model(0)
before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
options = {"lmbda": 0.0, "beta": 0.0, "max_length": 48, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1}
options |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": 0.0}
options |= {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 1, "report_to": "none"}
options |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
options |= {"ddp_backend": "gloo"} if processes > 1 else {}
trainer = GKDTrainer(
    student, teacher_model=model(1), args=GKDConfig(sys.argv[1] + f"/out-{processes}-{rank}", **options),
    train_dataset=Dataset.from_list([{"messages": chat}] * 4), processing_class=tokenizer,
)
trainer.train()
if rank == 0:
    after = torch.cat([p.detach().cpu().flatten() for p in student.parameters()])
    print("trl", version("trl"), "transformers", version("transformers"), file=sys.stderr)
    print((after - before).norm().item(), file=open(sys.argv[1] + f"/{processes}.txt", "w"))
PYTHON
export CI=1 HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
"$folder/venv/bin/python" "$folder/step.py" "$folder" > /dev/null 2> "$folder/log" || { cat "$folder/log"; exit 2; }
grep -m1 '^trl' "$folder/log"
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/step.py" "$folder" > /dev/null 2> "$folder/log" || { cat "$folder/log"; exit 2; }
one=$(cat "$folder/1.txt") two=$(cat "$folder/2.txt")
echo "length of the update on the same four chats: $one on one process, $two on two"
awk -v a="$one" -v b="$two" 'BEGIN { exit !(a > 0 && b / a > 0.49 && b / a < 0.51) }'
