"""torch.set_float32_matmul_precision: our products stay float32 products whatever it allows.

CPUs that multiply bfloat16 round the factors of a float32 product under "medium", those that multiply TF32 under
"high". Whichever CPU runs the tests, here torch's float32 products round their factors when they may."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fastdistil as fd
from fastdistil.ops.precision import _read, _write, full_precision

ROWS, SIZE, COLUMNS = 24, 16, 80


def may_round() -> bool:
    return _read("mkldnn", "matmul") in ("bf16", "tf32")


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.detach(), b.detach()
    if a.dtype == torch.float32 and may_round():
        a, b = a.bfloat16().float(), b.bfloat16().float()
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))


def _plus(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = alpha * _multiply(a, b)
    return product if beta == 0 else beta * c.detach() + product


@pytest.fixture(scope="module", autouse=True)
def rounding_products() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("mm", "bmm"):
            library.impl(name, _multiply, "CPU")
            library.impl(f"{name}.out", lambda a, b, *, out: out.copy_(_multiply(a, b)), "CPU")
        for name in ("addmm", "baddbmm"):
            library.impl(name, _plus, "CPU")
            library.impl(f"{name}_", lambda c, a, b, **factors: c.copy_(_plus(c, a, b, **factors)), "CPU")
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def default_setting() -> Iterator[None]:
    before = [_read(*key) for key in (("generic", "all"), ("mkldnn", "matmul"), ("cuda", "matmul"))]
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    _write("generic", "all", "none")
    assert not any(x in ("bf16", "tf32") for x in before)


def _draw(*shape: int, near: Tensor | None = None) -> Tensor:
    x = torch.randn(*shape)
    return x if near is None else near + 0.01 * x


def _linear(**options: Any) -> Tensor:
    torch.manual_seed(0)
    h, w = _draw(ROWS, SIZE), _draw(COLUMNS, SIZE)
    teacher = _draw(ROWS, SIZE, near=h), _draw(COLUMNS, SIZE, near=w)
    h, w = (x.to(options.pop("dtype", torch.float32)).requires_grad_() for x in (h, w))
    value = fd.linear_logit_loss(h, w, *teacher, **options)
    return torch.cat([x.flatten().float() for x in (value, *torch.autograd.grad(value.sum(), (h, w)))])


def _topk() -> Tensor:
    torch.manual_seed(0)
    h, w = _draw(ROWS, SIZE).requires_grad_(), _draw(COLUMNS, SIZE).requires_grad_()
    values, indices = torch.log_softmax(_draw(ROWS, COLUMNS), -1).topk(5)
    value = fd.linear_topk_logit_loss(h, w, values, indices)
    return torch.cat([x.flatten() for x in (value, *torch.autograd.grad(value, (h, w)))])


def _hidden(count: int = 1) -> Tensor:
    torch.manual_seed(0)
    h, p = _draw(ROWS, SIZE).requires_grad_(), _draw(12, SIZE).requires_grad_()
    t = _draw(ROWS, 12)
    students, teachers = (h, t) if count == 1 else ([h] * count, [t] * count)
    value = fd.hidden_loss(students, teachers, projection=p)
    return torch.cat([x.flatten() for x in (value, *torch.autograd.grad(value, (h, p)))])


def _attention(loss: Callable[..., Tensor] = fd.attention_loss, **options: Any) -> Tensor:
    torch.manual_seed(0)
    q, k = (_draw(2, 2, 40, 8).requires_grad_() for _ in range(2))
    value = fd.attention_loss(q, k, _draw(2, 2, 40, 8), _draw(2, 2, 40, 8), **options)
    return torch.cat([x.flatten() for x in (value, *torch.autograd.grad(value, (q, k)))])


LOSSES: dict[str, Callable[[], Tensor]] = {
    "linear_logit_loss": _linear,
    "a row": lambda: _linear(reduction="none"),
    "bfloat16 heads": lambda: _linear(dtype=torch.bfloat16),
    "reference": lambda: _linear(backend="reference", divergence="reverse_kl"),
    "mse of logits": lambda: _linear(divergence="mse"),
    "linear_topk_logit_loss": _topk,
    "hidden_loss": _hidden,
    "hidden_loss of layers": lambda: _hidden(2),
    "attention_loss": lambda: _attention(kind="score_mse"),
    "attention_loss, mean of heads": lambda: _attention(kind="prob_kl", heads="mean"),
    "attention_loss, reference": lambda: _attention(kind="prob_kl", backend="reference"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_products_are_exact_whatever_is_allowed(loss: Callable[[], Tensor]) -> None:
    expected = loss()
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(loss(), expected)
    assert torch.get_float32_matmul_precision() == "medium" and may_round()


def test_without_that_the_rounding_would_show() -> None:
    h, w = _draw(ROWS, SIZE), _draw(COLUMNS, SIZE)
    exact = functional.linear(h, w)
    torch.set_float32_matmul_precision("medium")
    assert (functional.linear(h, w) - exact).norm() > 1e-3 * exact.norm()


def _settings() -> list[Callable[[], object]]:
    def library(name: str, value: str) -> Callable[[], object]:
        return lambda: _write(name, "all" if name == "generic" else "matmul", value)

    return [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        library("mkldnn", "bf16"),
        library("cuda", "tf32"),
        library("generic", "bf16"),
        library("generic", "tf32"),
    ]


@pytest.mark.parametrize("setting", _settings())
def test_every_setting_comes_back(setting: Callable[[], object]) -> None:
    def read() -> list[str]:
        found = [_read("mkldnn", "matmul"), _read("cuda", "matmul"), _read("generic", "all")]
        try:
            return [*found, torch.get_float32_matmul_precision(), str(torch.backends.cuda.matmul.allow_tf32)]
        except RuntimeError as error:  # torch's own, where its two ways of setting contradict each other
            return [*found, str(error)]

    _write("mkldnn", "matmul", "none")
    _write("cuda", "matmul", "none")
    setting()
    before = read()
    with full_precision:
        assert not may_round() and _read("cuda", "matmul") not in ("bf16", "tf32")
    assert read() == before
    _write("generic", "all", "none")  # a library that followed it still does
    followed = read()
    setting()
    _write("generic", "all", "none")
    assert read() == followed


def test_the_last_thread_to_leave_gives_it_back() -> None:
    torch.set_float32_matmul_precision("medium")
    inside, over, seen = threading.Barrier(2), threading.Barrier(2), []

    def first() -> None:
        with full_precision:
            inside.wait()
        over.wait()

    def second() -> None:
        with full_precision:
            inside.wait()
            over.wait()  # the first has left
            seen.append(may_round())

    threads = [threading.Thread(target=x) for x in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] and torch.get_float32_matmul_precision() == "medium"


def test_a_setting_made_meanwhile_stays() -> None:
    torch.set_float32_matmul_precision("medium")
    with full_precision:
        torch.set_float32_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "high"


def test_it_comes_back_after_an_error() -> None:
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(ValueError, match="labels"), full_precision:
        raise ValueError("labels")
    assert torch.get_float32_matmul_precision() == "medium"
