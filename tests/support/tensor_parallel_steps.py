"""Run by test_sharded_heads.py under torchrun: a small Llama under tensor and sequence parallelism, whose ranks have
the same tokens, against one process."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from judge import SAME_STEP, error
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

import fastdistil as fd

VOCABULARY, SHAPE = 42, (2, 8)  # 42 over 4 ranks: 11, 11, 11 and 9
Loss = Callable[[Any, Any], Tensor]


def llama(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, num_key_value_heads=4, **sizes))


def split(model: Any, mesh: DeviceMesh, sequence: bool) -> Any:
    """As PyTorch's tutorial on tensor parallelism splits a Llama; with `sequence` the norms see parts of the rows."""
    rows = Shard(1) if sequence else Replicate()
    # Residuals are DTensors where they are parts of the rows.
    out = {"output_layouts": rows, "use_local_output": not sequence}
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(**out), "mlp.down_proj": RowwiseParallel(**out)}
    top: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), **out),
        "lm_head": ColwiseParallel(input_layouts=rows, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        whole = {"hidden_states": Replicate()}
        plan["self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": rows}, desired_input_kwarg_layouts=whole
        )
        plan["mlp"] = PrepareModuleInput(input_layouts=rows, desired_input_layouts=Replicate())
        plan |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
        top["model.norm"] = SequenceParallel()
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    return parallelize_module(model, mesh, top)


def ids() -> Tensor:
    return torch.randint(VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(0))


def states(model: Any) -> Any:
    return model.model(ids()).last_hidden_state


def options() -> dict[str, Any]:
    labels = ids().masked_fill(torch.arange(SHAPE[1]) > 5, -100)
    return {"temperature": 2.0, "labels": labels, "label_weight": 0.3, "weight": labels != -100}


def two_heads(student: Any, teacher: Any) -> Tensor:
    with torch.no_grad():
        target = states(teacher)
    heads = student.lm_head.weight, teacher.lm_head.weight.detach()
    loss: Tensor = fd.linear_logit_loss(states(student), heads[0], target, heads[1], **options())
    return loss


def top_k(student: Any, teacher: Any) -> Tensor:
    drawn = torch.randn(*SHAPE, VOCABULARY, generator=torch.Generator().manual_seed(1))
    known = drawn.log_softmax(-1).topk(3)
    loss: Tensor = fd.linear_topk_logit_loss(states(student), student.lm_head.weight, *known, **options())
    return loss


def whole_logits(student: Any, teacher: Any) -> Tensor:
    with torch.no_grad():
        target = teacher.lm_head(states(teacher))
    logits = student.lm_head(states(student))
    loss: Tensor = fd.logit_loss(logits, target, divergence="jsd", **options())
    return loss


def of_states(student: Any, teacher: Any) -> Tensor:
    """Of all rows, as the error says that a part of them is to be made whole."""
    own = states(student)
    if isinstance(own, DTensor):
        with pytest.raises(TypeError, match=r"hidden_loss: student is a DTensor placed as \(Shard\(dim=1\),\)"):
            fd.hidden_loss(own, torch.zeros(*SHAPE, own.shape[-1]))
        own = own.full_tensor()
    target = torch.randn(own.shape, generator=torch.Generator().manual_seed(3))
    loss: Tensor = fd.hidden_loss(own, target.to(own.dtype))
    return loss


def same_step(loss: Loss, mesh: DeviceMesh, sequence: bool, dtype: torch.dtype) -> None:
    """Value and gradients, the heads' and those of all that comes before."""
    models = [llama(0, 16).to(dtype), llama(1, 24).to(dtype)]
    whole = [copy.deepcopy(x).double() for x in models]
    models = [split(x, mesh, sequence) for x in models]
    value, wanted = loss(*models), loss(*whole)
    value.backward()
    wanted.backward()
    name = f"{loss.__name__}, sequence {sequence}, {dtype}"
    assert error(value, wanted) <= SAME_STEP[dtype], f"{name}: {error(value, wanted):.1e}"
    for (key, p), one in zip(models[0].named_parameters(), whole[0].parameters(), strict=True):
        if one.grad is not None:
            found = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            apart = error(found, one.grad)
            assert apart <= SAME_STEP[dtype], f"{name}: the gradient of {key} is off by {apart:.1e}"


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("model",))
    try:
        for sequence in (False, True):
            for dtype in SAME_STEP:
                for loss in (two_heads, top_k, whole_logits, of_states):
                    same_step(loss, mesh, sequence, dtype)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
