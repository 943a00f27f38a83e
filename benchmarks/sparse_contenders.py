"""Who is measured in sparse fine-tuning, and on what: shapes, selections, steps, and their memory.

topk        torch.topk on the concatenation of every |change|
composable  composable-sft's way: every |change| into a Python list, numpy.partition, then a mask a tensor; measured on
            a tenth of each tensor and multiplied by ten
fused       torch.optim.AdamW(fused=True) on everything
fused:bool, fused:float   the same behind gradients times a dense mask, as lottery-ticket trainers do it
fastdistil:<backend>[:backward]
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.sparse import SparseAdamW, SparseMask, random_mask, select_topk

DENSITY = 0.08  # BiStil's

Shapes = dict[str, tuple[int, ...]]
# Vocabularies of mBERT (177,853,440 parameters in all) and of English BERT base (109,482,240).
MBERT, BERT = 119_547, 30_522


def bert_shapes(vocabulary: int, tiny: bool) -> Shapes:
    """The 199 tensors of BERT base with its pooler."""
    d, layers, ffn = (32, 2, 64) if tiny else (768, 12, 3072)
    vocabulary = 515 if tiny else vocabulary
    found: Shapes = {"word": (vocabulary, d), "position": (512, d), "type": (2, d), "norm.w": (d,), "norm.b": (d,)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            found |= {f"{layer}.{name}.w": (d, d), f"{layer}.{name}.b": (d,)}
        found |= {f"{layer}.i.w": (ffn, d), f"{layer}.i.b": (ffn,), f"{layer}.f.w": (d, ffn), f"{layer}.f.b": (d,)}
        found |= {f"{layer}.n{i}.{x}": (d,) for i in (1, 2) for x in "wb"}
    return found | {"pooler.w": (d, d), "pooler.b": (d,)}


def parameters(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def models(shapes: Shapes, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and what training made of it: changes of very different size from tensor to tensor."""
    generator = torch.Generator(device).manual_seed(0)
    base, tuned = {}, {}
    for i, (name, shape) in enumerate(shapes.items()):
        base[name] = torch.randn(shape, device=device, generator=generator).mul_(0.02)
        tuned[name] = torch.randn(shape, device=device, generator=generator).mul_(1e-4 * (1 + i % 7)).add_(base[name])
    return tuned, base


# ---- selection


def topk(tuned: dict[str, Tensor], base: dict[str, Tensor], k: int) -> tuple[float, int]:
    """Sum of the chosen changes, and their number."""
    changes = torch.cat([(tuned[name] - base[name]).abs_().reshape(-1) for name in base])
    found = torch.topk(changes, k, sorted=False)
    return float(found.values.double().sum()), len(found.indices)


def composable(tuned: dict[str, Tensor], base: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """composable-sft's selection: a Python list of every change, numpy.partition, a dense mask a tensor."""
    import numpy

    changes: list[float] = []
    for name in base:
        changes.extend((tuned[name] - base[name]).view(-1).abs().tolist())
    ordered = numpy.partition(changes, len(changes) - k)
    threshold = ordered[len(changes) - k]
    return {name: (tuned[name] - base[name]).abs() >= threshold for name in base}


def chosen_sum(mask: SparseMask, tuned: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    total = 0.0
    for name, index in mask.items():
        at = [x.reshape(-1).index_select(0, index) for x in (tuned[name], base[name])]
        total += float((at[0] - at[1]).abs().double().sum())
    return total


# ---- a step


def dense_step(
    params: Sequence[Tensor], optimizer: torch.optim.Optimizer, masks: list[Tensor] | None
) -> Callable[[], object]:
    def run() -> None:
        if masks is not None:
            for param, mask in zip(params, masks, strict=True):
                assert param.grad is not None
                param.grad.mul_(mask)
        optimizer.step()

    return run


def mask_tensor(index: Tensor, like: Tensor) -> Tensor:
    found = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    found[index.long()] = True
    return found.view(like.shape)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


# ---- inside of the backward


def encoder(tiny: bool) -> tuple[nn.Module, Tensor]:
    """A BERT base of torch's own layers, and a batch of 2 sentences of 64 tokens."""
    d, layers, ffn, vocabulary = (32, 2, 64, 515) if tiny else (768, 12, 3072, BERT)
    layer = nn.TransformerEncoderLayer(d, 4 if tiny else 12, ffn, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(vocabulary, d), stack), torch.randint(vocabulary, (2, 64))


def training_step(in_backward: bool, tiny: bool) -> tuple[Callable[[], None], int]:
    torch.manual_seed(0)
    model, batch = encoder(tiny)
    mask = random_mask(model, density=DENSITY)
    optimizer = SparseAdamW(model, mask, step_in_backward=in_backward)

    def run() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run, sum(p.nbytes for p in model.parameters())


# ---- memory


def from_child(arguments: dict[str, Any]) -> dict[str, Any]:
    """Resident memory at the peak of a second run, beyond what was there before it."""
    tiny = arguments["tiny"]
    if arguments["what"] == "select":
        tuned, base = models(bert_shapes(MBERT, tiny), "cpu")
        k = round(DENSITY * parameters(bert_shapes(MBERT, tiny)))
        small = {n: x[:2] for n, x in tuned.items()}, {n: x[:2] for n, x in base.items()}

        def run(warm: bool = False) -> object:
            pair, wanted = (small, 100) if warm else ((tuned, base), k)
            if arguments["contender"] == "topk":
                return topk(*pair, wanted)
            return select_topk(*pair, k=wanted)

        run(warm=True)
        return {"peak_mib": peak_mib(run)}
    step_, _ = training_step(arguments["contender"].endswith(":backward"), tiny)
    step_()
    return {"peak_mib": peak_mib(step_)}


def peak_mib(run: Callable[[], object]) -> float:
    def resident(line: str) -> float:
        status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
        return int(status[line].split()[0]) / 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    result = run()
    peak = resident("VmHWM") - before
    del result
    return peak
