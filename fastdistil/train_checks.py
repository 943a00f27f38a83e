"""What `train` refuses before anything runs."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from fastdistil.train import Options
    from fastdistil.validation import Evaluate


def whole_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        way = " of steps (round(share * steps))" if name == "warmup" else ""
        raise TypeError(f"Options: {name} is {value!r}, expected a whole number{way}")


def arguments(objective: object, options: object, wanted: type, optimizer: object) -> None:
    if not isinstance(options, wanted):
        raise TypeError(f"train: options is {type(options).__name__}, expected fastdistil.train.Options")
    if not isinstance(objective, nn.Module) or not callable(getattr(objective, "counts", None)):
        raise TypeError(
            f"train: objective is {type(objective).__name__}, expected a module with a method counts(batch), such as "
            "fastdistil.recipes.terms.Distillation(model, terms, teacher)"
        )
    if not callable(optimizer):
        raise TypeError(
            f"train: optimizer is {type(optimizer).__name__}, expected a function that makes one, such as "
            "lambda module, options: torch.optim.AdamW(module.parameters(), lr=options.lr)"
        )


def evaluation(options: Options, evaluate: Evaluate | None) -> None:
    for name in ("evaluate_every", "metric", "patience"):
        if evaluate is None and getattr(options, name) is not None:
            raise ValueError(f"train: options has {name} = {getattr(options, name)!r}, but no evaluate came")


def in_backward(updates: torch.optim.Optimizer, options: Options, processes: int) -> None:
    """An optimizer that uses up each gradient inside of the backward leaves none for what needs all of them later."""
    if not getattr(updates, "step_in_backward", False):
        return
    if options.max_grad_norm is not None:
        against = f"options has max_grad_norm = {options.max_grad_norm}, expected None"
    elif options.accumulate > 1:
        against = f"options has accumulate = {options.accumulate}, expected 1"
    elif options.precision == "fp16":
        against = "options has precision = 'fp16', which scales gradients, expected 'no' or 'bf16'"
    elif processes > 1:
        against = f"{processes} processes run, whose gradients are not added up before, expected 1"
    else:
        return
    name = type(updates).__name__
    raise ValueError(f"train: optimizer is {name} with step_in_backward=True, which frees each gradient; {against}")
