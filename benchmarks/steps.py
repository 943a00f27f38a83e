"""One whole training step: the teacher's forward, the student's, the layer losses, the backward.

The teacher has mBERT's size, the student half of its blocks; random weights, no dropout, B sentences of S tokens
without padding. "lightmbert" compares the last states and the last map (arXiv 2103.06418), "bistil" every student
block's with every second of the teacher's (arXiv 2306.01709), which keeps all maps alive.

eager            output_attentions=True under eager attention, mse_loss between the maps and between the states
fastdistil:cpu   SDPA under fastdistil.capture, attention_loss and hidden_loss
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fastdistil.benchmarks.measure import OtherLoad, child, peak_of_mib, quantiles
from fastdistil.benchmarks.record import Record, environment
from torch import Tensor

import fastdistil

CONTENDERS = ("eager", "fastdistil:cpu")
LIMIT = 1e-4  # relative difference of loss and gradients that counts as the same step; float32 through 12 blocks


@dataclass(frozen=True)
class Sizes:
    batch: int = 8
    length: int = 256
    blocks: int = 12  # of the teacher
    width: int = 768
    heads: int = 12
    vocabulary: int = 119_547
    repetitions: int = 3


TINY = Sizes(2, 16, 4, 32, 4, 99)


class Step:
    """Both models, and what one contender makes of a batch."""

    def __init__(self, contender: str, recipe: str, sizes: Sizes) -> None:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        self.contender, self.sizes = contender, sizes
        blocks = {"lightmbert": [sizes.blocks // 2], "bistil": [*range(1, sizes.blocks // 2 + 1)]}[recipe]
        states = blocks if recipe == "lightmbert" else [0, *blocks]
        self.attentions, self.states = ([(layer, 2 * layer) for layer in x] for x in (blocks, states))
        options: dict[str, Any] = {
            "vocab_size": sizes.vocabulary, "hidden_size": sizes.width, "num_attention_heads": sizes.heads,
            "intermediate_size": 4 * sizes.width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "eager" if contender == "eager" else "sdpa",
        }  # fmt: skip
        self.teacher = BertModel(BertConfig(num_hidden_layers=sizes.blocks, **options), add_pooling_layer=False)
        self.student = BertModel(BertConfig(num_hidden_layers=sizes.blocks // 2, **options), add_pooling_layer=False)
        self.student.embeddings.word_embeddings.weight.requires_grad_(False)  # as LightMBERT has it
        self.tokens = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length))

    def loss(self) -> Tensor:
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

    def run(self) -> float:
        """The loss; gradients are left in the student."""
        self.student.zero_grad()
        value = self.loss()
        value.backward()
        return value.item()

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.student.parameters() if p.grad is not None])


def from_child(arguments: dict[str, Any]) -> dict[str, Any]:
    step = Step(arguments["contender"], arguments["recipe"], Sizes(**arguments["sizes"]))
    step.run()
    return {"peak_mib": peak_of_mib(step.run)}


def run(recipe: str, tiny: bool, say: Callable[[str], None]) -> list[Record]:
    """A record a contender, timed in turns; memory from a process of its own each."""
    sizes = TINY if tiny else Sizes()
    say(f"step {recipe}: B {sizes.batch}, S {sizes.length}, {sizes.blocks} and {sizes.blocks // 2} blocks")
    steps = {name: Step(name, recipe, sizes) for name in CONTENDERS}
    values = {name: step.run() for name, step in steps.items()}
    gradients = {name: step.gradient() for name, step in steps.items()}
    true = gradients["eager"]
    off = {
        name: (abs(values[name] / values["eager"] - 1), float((gradients[name] - true).norm() / true.norm()))
        for name in steps
    }
    del gradients, true
    if max(max(x) for x in off.values()) > LIMIT:
        raise ValueError(f"step {recipe}: the contenders disagree, (loss, gradient) off by {off}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    with OtherLoad() as other:
        for _ in range(sizes.repetitions):
            for name, step in steps.items():
                start = time.perf_counter()
                step.run()
                times[name].append((time.perf_counter() - start) * 1e6)
    del steps
    gc.collect()
    records: list[Record] = []
    for name, samples in times.items():
        arguments = {"contender": name, "recipe": recipe, "sizes": vars(sizes)}
        record = {
            "op": "steps", "case": recipe, "shape": {"B": sizes.batch, "S": sizes.length, "L": sizes.blocks},
            "dtype": "float32", "contender": name, "status": "ok", "time_us": {"both": quantiles(samples)},
            "repetitions": sizes.repetitions, "other_load_cores": other.cores, "small": tiny,
            "value_error": off[name][0], "gradient_error": off[name][1],
            "peak_mem_mib": None if tiny else child("step", arguments)["peak_mib"], **environment("steps", "cpu"),
        }  # fmt: skip
        memory = "" if tiny else f", {record['peak_mem_mib']:,.0f} MiB beyond the models"
        say(f"  {name}: {record['time_us']['both']['p50'] / 1e6:.2f} s{memory}")
        records.append(record)
    return records
