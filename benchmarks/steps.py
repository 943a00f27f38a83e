"""One whole training step: the teacher's forward, the student's, the layer losses, the backward.

The teacher has mBERT's size, the student half of its blocks; random weights, no dropout, B sentences of S tokens
without padding. "lightmbert" compares the last states and the last map (arXiv 2103.06418), "bistil" every student
block's with every second of the teacher's (arXiv 2306.01709), which keeps all maps alive. float32 on a CPU; on a GPU
bfloat16 under torch.autocast over float32 weights, as trainers have it.

eager                   output_attentions=True under eager attention, mse_loss between the maps and between the states
fastdistil:<backend>    SDPA under fastdistil.capture, attention_loss and hidden_loss
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fastdistil.benchmarks.measure import (
    Clock,
    OtherLoad,
    child,
    floor_of,
    peak_of_cuda_mib,
    peak_of_mib,
    quantiles,
)
from fastdistil.benchmarks.record import Record, environment
from torch import Tensor

import fastdistil

# Relative difference of loss and gradients, beyond twice eager's, that counts as the same step: through 12 blocks.
LIMIT = {"float32": 1e-4, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Sizes:
    batch: int = 8
    length: int = 256
    blocks: int = 12  # of the teacher
    width: int = 768
    heads: int = 12
    vocabulary: int = 119_547
    repetitions: int = 3


SIZES = {"cpu": Sizes(), "cuda": Sizes(batch=32, repetitions=20)}
TINY = Sizes(2, 16, 4, 32, 4, 99)


def contenders(device: str) -> tuple[str, str]:
    return "eager", f"fastdistil:{'cpu' if device == 'cpu' else 'triton'}"


class Step:
    """Both models, and what one contender makes of a batch; `half`: under autocast."""

    def __init__(self, contender: str, recipe: str, sizes: Sizes, device: str = "cpu", half: bool = False) -> None:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        self.contender, self.sizes, self.device, self.half = contender, sizes, device, half
        blocks = {"lightmbert": [sizes.blocks // 2], "bistil": [*range(1, sizes.blocks // 2 + 1)]}[recipe]
        states = blocks if recipe == "lightmbert" else [0, *blocks]
        self.attentions, self.states = ([(layer, 2 * layer) for layer in x] for x in (blocks, states))
        options: dict[str, Any] = {
            "vocab_size": sizes.vocabulary, "hidden_size": sizes.width, "num_attention_heads": sizes.heads,
            "intermediate_size": 4 * sizes.width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "eager" if contender == "eager" else "sdpa",
        }  # fmt: skip
        with torch.device(device):
            self.teacher, self.student = (
                BertModel(BertConfig(num_hidden_layers=count, **options), add_pooling_layer=False)
                for count in (sizes.blocks, sizes.blocks // 2)
            )
        self.student.embeddings.word_embeddings.weight.requires_grad_(False)  # as LightMBERT has it
        self.tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length), device=device)

    def loss(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return self._eager() if self.contender == "eager" else self._captured()

    def _eager(self) -> Tensor:
        shown: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            t = self.teacher(self.tokens, **shown)
        s = self.student(self.tokens, **shown)
        maps = [F.mse_loss(s.attentions[i - 1], t.attentions[j - 1]) for i, j in self.attentions]
        states = [F.mse_loss(s.hidden_states[i], t.hidden_states[j]) for i, j in self.states]
        return torch.stack(maps).mean() + torch.stack(states).mean()

    def _captured(self) -> Tensor:
        def layers(side: int) -> dict[str, list[int]]:
            maps = [pair[side] for pair in self.attentions]
            return {"queries": maps, "keys": maps, "hidden_states": [pair[side] for pair in self.states]}

        with torch.no_grad(), fastdistil.capture(self.teacher, **layers(1)) as t:
            self.teacher(self.tokens)
        with fastdistil.capture(self.student, **layers(0)) as s:
            self.student(self.tokens)
        maps = [fastdistil.attention_loss(s.queries[i], s.keys[i], t.queries[j], t.keys[j]) for i, j in self.attentions]
        states = fastdistil.hidden_loss(*([x.hidden_states[k[n]] for k in self.states] for n, x in enumerate((s, t))))
        return torch.stack(maps).mean() + states

    def run(self) -> Tensor:
        """The loss; gradients are left in the student."""
        self.student.zero_grad()
        value = self.loss()
        value.backward()
        return value.detach()

    def outcome(self) -> tuple[float, Tensor]:
        value = self.run().item()
        return value, torch.cat([p.grad.flatten() for p in self.student.parameters() if p.grad is not None])

    def operations(self) -> int:
        """Of the matrix products: the teacher's forward, the student's, and twice that back."""
        s = self.sizes
        block = 2 * s.batch * s.length * (12 * s.width**2 + 2 * s.length * s.width)
        return block * (s.blocks + 3 * (s.blocks // 2))

    def bytes(self) -> int:
        """Every weight but the embeddings read once, every gradient written once."""
        blocks = [p for model in (self.teacher, self.student) for p in model.encoder.parameters()]
        return sum(p.nbytes for p in (*blocks, *self.student.encoder.parameters()))


def from_child(arguments: dict[str, Any]) -> dict[str, Any]:
    step = Step(arguments["contender"], arguments["recipe"], Sizes(**arguments["sizes"]))
    step.run()
    return {"peak_mib": peak_of_mib(step.run)}


def off(found: tuple[float, Tensor], true: tuple[float, Tensor]) -> tuple[float, float]:
    """Relative errors of the loss and of all gradients together."""
    return abs(found[0] / true[0] - 1), float((found[1] - true[1]).norm() / true[1].norm())


def run(recipe: str, device: str, tiny: bool, rates: dict[str, float], say: Callable[[str], None]) -> list[Record]:
    """A record a contender, timed in turns; memory from a process of its own each on a CPU. The truth is the eager step
    in float32, than which eager's own may be off by its 16-bit rounding, and ours by twice as much."""
    sizes, half = TINY if tiny else SIZES[device], device == "cuda"
    say(f"step {recipe}: B {sizes.batch}, S {sizes.length}, {sizes.blocks} and {sizes.blocks // 2} blocks")
    true = Step("eager", recipe, sizes, device).outcome()
    steps = {name: Step(name, recipe, sizes, device, half) for name in contenders(device)}
    errors = {name: off(step.outcome(), true) for name, step in steps.items()}
    del true
    dtype = "bfloat16" if half else "float32"
    allowed = [2 * error + LIMIT[dtype] for error in errors["eager"]]
    if any(own > limit for found in errors.values() for own, limit in zip(found, allowed, strict=True)):
        raise ValueError(f"step {recipe}: the contenders disagree, (loss, gradient) off by {errors}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    clock = Clock(device)
    with OtherLoad() as other:
        for _ in range(sizes.repetitions):
            for name, step in steps.items():
                start = clock.mark()
                step.run()
                times[name].append(clock.between_us(start, clock.mark()))
    shared = {
        "op": "steps", "case": recipe, "shape": {"B": sizes.batch, "S": sizes.length, "L": sizes.blocks},
        "dtype": dtype, "status": "ok", "repetitions": sizes.repetitions,
        "other_load_cores": other.cores, "small": tiny, "rates": rates, "bars": [],
        "flops": {"both": steps["eager"].operations()}, "bytes": {"both": steps["eager"].bytes()},
        **environment("steps", device),
    }  # fmt: skip
    peaks = _peaks(steps, recipe, device, tiny)
    medians = {name: quantiles(samples)["p50"] for name, samples in times.items()}
    floor = floor_of(shared["bytes"]["both"], shared["flops"]["both"], rates)
    records: list[Record] = []
    for name, samples in times.items():
        ratios = {
            "eager_over_this": medians["eager"] / medians[name],
            "this_over_best": medians[name] / min(medians.values()), "this_over_floor": medians[name] / floor,
        }  # fmt: skip
        records.append({
            **shared, "contender": name, "time_us": {"both": quantiles(samples)}, "ratios": {"both": ratios},
            "value_error": errors[name][0], "gradient_error": errors[name][1], "peak_mem_mib": peaks[name],
        })  # fmt: skip
        memory = "" if peaks[name] is None else f", {peaks[name]:,.0f} MiB beyond the models"
        say(f"  {name}: {medians[name] / 1e3:,.1f} ms{memory}")
    return records


def _peaks(steps: dict[str, Step], recipe: str, device: str, tiny: bool) -> dict[str, float | None]:
    """Empties `steps`: on a CPU each contender has a process of its own, which must find the memory free."""
    if device == "cuda":
        return {name: peak_of_cuda_mib(step.run) for name, step in steps.items()}
    names = {name: {"contender": name, "recipe": recipe, "sizes": vars(step.sizes)} for name, step in steps.items()}
    steps.clear()
    gc.collect()
    return {name: None if tiny else child("step", task)["peak_mib"] for name, task in names.items()}
