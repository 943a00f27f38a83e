"""capture on any model of the attention interface, under checkpointing, data parallelism and threads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from test_capture import SIZES, _inputs, _model

from fastdistil.models.capture import capture

transformers = pytest.importorskip("transformers")


def _decoder(family: str, blocks: int = 3) -> torch.nn.Module:
    """Grouped-query attention on half as many key heads; ModernBERT with its local layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": blocks, "num_attention_heads": 4, **SIZES}
    if family == "modernbert":
        config = transformers.ModernBertConfig(**sizes, pad_token_id=0, local_attention=4)
    else:
        kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config, "gemma": transformers.GemmaConfig,
                "gemma3": transformers.Gemma3TextConfig}[family]  # fmt: skip
        config = kind(**sizes, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("family", ["modernbert", "llama", "qwen3", "gemma", "gemma3"])
def test_any_model_on_the_attention_interface(family: str) -> None:
    """Queries and keys after the rotary embedding, keys before they are repeated: the maps that eager shows."""
    inputs = _inputs()
    model = _decoder(family)
    plain = model(**inputs)[0]
    with capture(model, hidden_states=[0, 1, 2, 3], queries=[1, 3], keys=[1, 3], values=[2]) as captured:
        assert torch.equal(model(**inputs)[0], plain)
    model.set_attn_implementation("eager")
    shown = model(**inputs, output_attentions=True, output_hidden_states=True)
    for layer in (0, 1, 2):  # the model's last one comes after its final norm
        keep = inputs["attention_mask"].bool()  # ModernBERT's padded rows differ between SDPA and eager
        torch.testing.assert_close(captured.hidden_states[layer][keep], shown.hidden_states[layer][keep])
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    heads = 4 if family == "modernbert" else 2
    assert captured.values[2].shape == (2, heads, 11, 8)
    for layer in (1, 3):
        query, key = captured.queries[layer], captured.keys[layer]
        assert query.shape == (2, 4, 11, 8) and key.shape == (2, heads, 11, 8)
        scale = getattr(attentions[layer - 1], "scaling", 8**-0.5)
        expected = shown.attentions[layer - 1]
        scores = query @ key.repeat_interleave(4 // heads, 1).mT * scale
        rows = inputs["attention_mask"][:, None, :, None].bool()
        found = scores.masked_fill(expected == 0, -torch.inf).softmax(-1)
        torch.testing.assert_close(found.masked_fill(~rows, 0.0), expected.masked_fill(~rows, 0.0))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing(family: str) -> None:
    """What is captured keeps its gradient, and the blocks' second run for the backward pass is not captured."""
    model = (_model(family) if family == "bert" else _decoder(family)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with capture(model, queries=[2], keys=[2], hidden_states=[2]) as captured:
            model(**_inputs())
            kept = captured.queries[2]
            (captured.queries[2].square().sum() + captured.keys[2].sum() + captured.hidden_states[2].sum()).backward()
            assert captured.queries[2] is kept
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(
            RuntimeError, match=r"capture: queries of layer 2 of \w+ run without gradient in a pass with grad"
        ),
        capture(model, queries=[2]),
    ):
        model(**_inputs())


def test_threads_do_not_mix() -> None:
    """Two threads capture different layers of one model on different inputs at the same time."""
    model, inputs = _model("bert"), _inputs()
    alone = {}
    for length in (5, 9):
        with capture(model, queries=[1]) as captured:
            model(inputs["input_ids"][:, :length])
        alone[length] = captured.queries[1]
    failures, barrier = [], threading.Barrier(2)

    def work(length: int) -> None:
        for _ in range(5):
            barrier.wait()
            with capture(model, queries=[1], hidden_states=[0] if length == 5 else []) as captured:
                barrier.wait()
                model(inputs["input_ids"][:, :length])
                if not torch.equal(captured.queries[1], alone[length]) or (length == 9) == bool(captured.hidden_states):
                    failures.append(length)

    threads = [threading.Thread(target=work, args=(length,)) for length in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and model.config._attn_implementation == "sdpa"


def _train_in_parallel(rank: int, world: int, folder: str) -> None:
    """One of the processes: its own sequence, its loss from what it captured, the gradients averaged by DDP."""
    torch.set_num_threads(1)
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        model = _model("bert").train(False)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        inputs = {name: x[rank : rank + 1] for name, x in _inputs().items()}
        with capture(wrapped, queries=[2]) as captured:
            output = wrapped(**inputs)[0]
        (captured.queries[2].square().sum() + 0 * output.sum()).backward()
        weight = model.encoder.layer[1].attention.self.query.weight
        torch.save((captured.queries[2].detach(), weight.grad), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.soak
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
def test_inside_of_distributed_data_parallel(tmp_path: Path) -> None:
    """Two processes: each captures its own batch, and the gradient through it is averaged over both."""
    torch.multiprocessing.spawn(_train_in_parallel, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = _model("bert").train(False)
    with capture(model, queries=[2]) as alone:
        model(**_inputs())
    torch.testing.assert_close(torch.cat([queries for queries, _ in found]), alone.queries[2].detach())
    (alone.queries[2].square().sum() / 2).backward()
    for _, gradient in found:
        torch.testing.assert_close(gradient, model.encoder.layer[1].attention.self.query.weight.grad)


def test_a_layer_without_the_attention_interface_is_named() -> None:
    model = _model("bert")
    own = torch.nn.Module()
    own.forward = lambda hidden_states, *_, **__: (hidden_states, None)  # type: ignore[method-assign]
    model.encoder.layer[1].attention.self = own
    with capture(model, hidden_states=[2], queries=[1]):
        model(**_inputs())
    with (
        pytest.raises(
            RuntimeError, match=r"capture: keys of layer 2 of BertModel cannot be captured: its block does not"
        ),
        capture(model, queries=[1], keys=[2, 3]),
    ):
        model(**_inputs())
    torch._dynamo.reset()
    for fullgraph in (False, True):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        with pytest.raises(RuntimeError, match="capture: keys of layer 2 of BertModel"), capture(compiled, keys=[2]):
            compiled(**_inputs())
    assert model.config._attn_implementation == "sdpa"
