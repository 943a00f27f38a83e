"""Every loss on rows as training makes them (tests/support/rows.py), judged row by row against tests/support/truth.py.

A failing case prints one line; `python tests/fuzz.py --case 'LINE'` runs it again. `make judge` runs this file and
the CUDA kernels' cases alone; `make fuzz` draws more of them and keeps those that fail in tests/data/cases.jsonl, which are tests from then on.
"""

from __future__ import annotations

import math
from pathlib import Path

import double_double as D
import mpmath
import numpy as np
import pytest
import rows
import truth
from conftest import available
from hypothesis import HealthCheck, Phase, given, settings
from judge import judge_problem
from problems import PROBLEMS

from fastdistil import _C

KEPT = Path(__file__).parents[1] / "data/cases.jsonl"
LINES = KEPT.read_text().splitlines()
EVERY = {"max_examples": 300, "database": None, "deadline": None, "derandomize": True, "print_blob": False}
CHECKS = list(HealthCheck)
SMALL = 300  # numbers: Triton's interpreter takes seconds for more


def quickly(count: int) -> settings:
    """No shrinking: a case is one line already."""
    options = EVERY | {"max_examples": count}
    return settings(**options, suppress_health_check=CHECKS, phases=[Phase.explicit, Phase.generate])


def check(case: object, backends: list[str], every_isa: bool = True) -> None:
    problem = PROBLEMS[case.loss](case)  # type: ignore[attr-defined]
    for backend in backends:
        for isa in _C.isas() if backend == "cpu" and every_isa else [_C.isa()]:
            before = _C.isa()
            _C.use_isa(isa)
            try:
                judge_problem(problem, backend)
            except Exception as error:
                name = f"{backend} ({isa})" if backend == "cpu" else backend
                raise AssertionError(f"{name}: {error}\n{rows.as_line(case)}") from error
            finally:
                _C.use_isa(before)


def judge_some(
    loss: str, count: int, backends: list[str], largest: int = 2**31, every_isa: bool = True, labels: bool = True
) -> None:
    failures: list[str] = []

    @quickly(count)
    @given(
        rows.STRATEGIES[loss]().filter(lambda case: rows.size(case) <= largest and (labels or not case.label_weight))
    )
    def judged(case: object) -> None:
        try:
            check(case, backends, every_isa)
        except AssertionError as error:
            failures.append(str(error))

    judged()
    assert not failures, f"{len(failures)} of {count} cases:\n" + "\n".join(failures)


@pytest.mark.parametrize("loss", rows.CASES)
def test_every_loss(loss: str) -> None:
    judge_some(loss, 100, available("reference", "cpu"))


@pytest.mark.drawn
@pytest.mark.parametrize("loss", rows.CASES)
def test_every_loss_on_more(loss: str) -> None:
    judge_some(loss, 300, available("reference", "cpu"))


@pytest.mark.parametrize("loss", rows.CASES)
def test_triton(loss: str) -> None:
    judge_some(loss, 10, available("triton"), SMALL)


@pytest.mark.drawn
@pytest.mark.parametrize("loss", rows.CASES)
def test_triton_on_more(loss: str) -> None:
    judge_some(loss, 60, available("triton"), SMALL)


@pytest.mark.parametrize("line", LINES)
def test_kept_cases(line: str) -> None:
    """Every case that ever failed."""
    case = rows.from_line(line)
    check(case, available("reference", "cpu", *(["triton"] if rows.size(case) <= SMALL else [])))


# ---- the truth itself, against 50 digits


def exact(x: D.DD) -> list[mpmath.mpf]:
    return [mpmath.mpf(float(h)) + mpmath.mpf(float(l)) for h, l in zip(x.hi.ravel(), x.lo.ravel(), strict=True)]


@pytest.mark.parametrize("name", ["exp", "log", "sqrt"])
def test_functions_of_31_digits(name: str) -> None:
    generator = np.random.default_rng(0)
    x = D.DD(generator.standard_normal(200) * np.repeat([1e-9, 1e-3, 1.0, 150.0], 50)) + 1e-20
    x = x if name == "exp" else D.exp(x)
    with mpmath.workdps(50):
        for found, at in zip(exact(getattr(D, name)(x)), exact(x), strict=True):
            right = getattr(mpmath, name)(at)
            assert abs(found - right) <= 1e-29 * max(abs(right), 1 if name == "log" else 0)


def plain_rows(
    name: str, beta: float, a: list[mpmath.mpf], b: list[mpmath.mpf], held: mpmath.mpf | None = None
) -> mpmath.mpf:
    """A row's divergence of tempered logits, as docs/losses.md has it; held: the acceptance rate that lk_hybrid takes for
    a constant."""
    if name == "mse":
        return mpmath.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    p, q = ([mpmath.exp(x) for x in row] for row in (a, b))
    p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, q))

    def kl(x: list[mpmath.mpf], y: list[mpmath.mpf]) -> mpmath.mpf:
        return mpmath.fsum(u * mpmath.log(u / v) for u, v in zip(x, y, strict=True))

    def mixed(x: list[mpmath.mpf], y: list[mpmath.mpf]) -> list[mpmath.mpf]:
        return [beta * u + (1 - beta) * v for u, v in zip(x, y, strict=True)]

    def acceptance() -> mpmath.mpf:
        return mpmath.fsum(min(u, v) for u, v in zip(p, q, strict=True))

    def tvd() -> mpmath.mpf:
        return mpmath.fsum(abs(u - v) for u, v in zip(p, q, strict=True)) / 2

    def hybrid() -> mpmath.mpf:
        share = mpmath.exp(-beta * (acceptance() if held is None else held))
        return share * kl(q, p) + (1 - share) * tvd()

    beta = mpmath.mpf(beta)
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, mixed(q, p)) + (1 - beta) * kl(p, mixed(q, p)),
        "skew_kl": lambda: kl(q, mixed(q, p)),
        "skew_reverse_kl": lambda: kl(p, mixed(p, q)),
        "tvd": tvd,
        "nla": lambda: -mpmath.log(acceptance()),
        "lk_hybrid": hybrid,
    }[name]()


@pytest.mark.parametrize("name", rows.LOSSES)
def test_truth_of_logits(name: str) -> None:
    """Values by the formula in 60 digits, gradients by central differences of it."""
    generator = np.random.default_rng(1)
    for confidence, noise, offset in ((1e-1, 1.0, 0.0), (1e-9, 1.0, 1e3), (1e-1, 1e-5, 1e3), (1e-9, 1e-5, 0.0)):
        b = rows.surest(generator.standard_normal((1, 5)), np.array([2]), confidence)
        a = b + noise * generator.standard_normal((1, 5)) + offset
        beta = 1 - 1e-4 if name == "jsd" else 0.3
        value, gradient = truth.divergence(name, beta, D.DD(a), D.DD(b))
        with mpmath.workdps(60):
            x, y = ([mpmath.mpf(float(z)) for z in row[0]] for row in (a, b))
            right, held = plain_rows(name, beta, x, y), mpmath.exp(-plain_rows("nla", beta, x, y))
            assert abs(value[0] - right) <= 1e-7 * abs(right)
            step, slopes = mpmath.mpf(10) ** -20, []
            for i in range(5):
                up, down = ([z + sign * step * (i == j) for j, z in enumerate(x)] for sign in (1, -1))
                slopes.append(
                    (plain_rows(name, beta, up, y, held) - plain_rows(name, beta, down, y, held)) / (2 * step)
                )
            size = mpmath.sqrt(mpmath.fsum(z * z for z in slopes))
            assert all(abs(g - z) <= 1e-9 * size for g, z in zip(gradient[0], slopes, strict=True))


def test_truth_of_other_losses_is_its_own_slope() -> None:
    """Gradients of the other truths against differences of their values, which are short sums of squares and KLs."""
    generator = np.random.default_rng(2)
    step = 1e-9
    h, t = generator.standard_normal((2, 3, 6))
    a, b = generator.standard_normal((2, 1, 2, 4, 4))
    visible = np.tri(4, dtype=bool)[None, None]
    u = np.log(np.full((3, 2), 0.3))
    columns = np.array([[0, 3], [1, 2], [5, -1]])
    functions = [
        (lambda x, f=form: truth.hidden(f, x, D.DD(t)), h) for form in ("mse", "cosine", "kl")
    ] + [
        (lambda x, f=form, m=mean: truth.maps(f, x, D.DD(b), visible, m), a)
        for form in ("prob_kl", "prob_mse", "score_mse") for mean in (False, True)
    ] + [
        (lambda x, k=kind, d=name: truth.topk(d, 0.3, k, x, u, columns, None, 2.0**-24), h)
        for kind, name in (("bucket", "reverse_kl"), ("bucket", "jsd"), ("renormalize", "skew_kl"), ("zero", "forward_kl"))
    ]  # fmt: skip
    for function, at in functions:
        _, gradient = function(D.DD(at))
        for index in list(np.ndindex(at.shape))[::5]:
            moved = np.zeros(at.shape)
            moved[index] = step
            up, down = (function(D.DD(at, sign * moved))[0].sum() for sign in (1, -1))
            assert math.isclose((up - down) / (2 * step), gradient[index], rel_tol=1e-4, abs_tol=1e-5)
