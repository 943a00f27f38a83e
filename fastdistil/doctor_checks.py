"""The kernels' checks behind `fastdistil doctor`: each function on a few rows against its formula in float64.

A formula is written out here in plain PyTorch, apart from the reference, which is one of the backends that are checked.
Where the rounding of products does not stand in the way, the student is 1e-3 from its teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NEAR = 1e-3


def errors(backend: str, device: str, isa: str = "") -> dict[str, float]:
    """The largest relative error of value and gradient of every function that the backend has. `isa`: one of the CPU's
    instruction sets, which is in use for the time of the checks."""
    if isa:
        from fastdistil import _C

        before = _C.isa()
        _C.use_isa(isa)
        try:
            return errors(backend, device)
        finally:
            _C.use_isa(before)
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check(backend, device)
        except ValueError as error:
            if f"{backend!r}" not in str(error) or "has no" not in str(error):
                raise
    return found


def _drawn(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    import torch

    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the rows of KL(softmax(teacher) || softmax(student))."""
    q = teacher.log_softmax(-1)
    return (q.exp() * (q - student.log_softmax(-1))).sum(-1).mean()


def _compared(
    loss: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor], start: Tensor, device: str
) -> float:
    """Of value and gradient in `start`: float32 on the device for the loss, float64 on the CPU for the formula."""
    import torch

    ours, exact = start.to(device).requires_grad_(), start.double().requires_grad_()
    value, truth = loss(ours), formula(exact)
    (gradient,), (true_gradient,) = torch.autograd.grad(value, ours), torch.autograd.grad(truth, exact)
    value_error = (value.detach().cpu().double() - truth.detach()).abs() / truth.detach()
    gradient_error = (gradient.cpu().double() - true_gradient).norm() / true_gradient.norm()
    return max(float(value_error), float(gradient_error))


def _logit(backend: str, device: str) -> float:
    import fastdistil

    teacher = _drawn(4, 1031, scale=4)
    return _compared(
        lambda x: fastdistil.logit_loss(x, teacher.to(device), backend=backend),
        lambda x: _kl(x, teacher.double()),
        teacher + _drawn(4, 1031, scale=NEAR, seed=1),
        device,
    )


def _linear_logit(backend: str, device: str) -> float:
    import fastdistil

    states, head = _drawn(4, 16), _drawn(1031, 16)
    shared = head.to(device)
    return _compared(
        lambda x: fastdistil.linear_logit_loss(x, shared, states.to(device), shared, backend=backend),
        lambda x: _kl(x @ head.double().T, states.double() @ head.double().T),
        states + _drawn(4, 16, scale=NEAR, seed=1),
        device,
    )


def _topk_formula(logits: Tensor, values: Tensor, indices: Tensor, tail: Tensor) -> Tensor:
    """Over the K columns and all others together."""
    import torch

    others = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    teacher = torch.cat((values.double(), tail.double()[..., None]), -1)
    return _kl(torch.cat((logits.gather(-1, indices), others), -1), teacher)


def _topk_teacher(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    values, indices = logits.double().log_softmax(-1).topk(8)
    tail = logits.double().log_softmax(-1).scatter(-1, indices, -torch.inf).logsumexp(-1)
    return values.float(), indices, tail


def _topk(backend: str, device: str) -> float:
    import fastdistil

    logits = _drawn(4, 1031, scale=4)
    values, indices, tail = _topk_teacher(logits)
    given = (values.to(device), indices.to(device))
    return _compared(
        lambda x: fastdistil.topk_logit_loss(x, *given, teacher_tail=tail.to(device), backend=backend),
        lambda x: _topk_formula(x, values, indices, tail),
        logits + _drawn(4, 1031, scale=NEAR, seed=1),
        device,
    )


def _linear_topk(backend: str, device: str) -> float:
    import fastdistil

    head = _drawn(1031, 16)
    values, indices, tail = _topk_teacher(_drawn(4, 1031, scale=4))
    given = (head.to(device), values.to(device), indices.to(device))
    return _compared(
        lambda x: fastdistil.linear_topk_logit_loss(x, *given, teacher_tail=tail.to(device), backend=backend),
        lambda x: _topk_formula(x @ head.double().T, values, indices, tail),
        _drawn(4, 16),
        device,
    )


def _student_topk(backend: str, device: str) -> float:
    import fastdistil

    teacher = _drawn(4, 1031, scale=4)
    start = teacher + _drawn(4, 1031, scale=NEAR, seed=1)
    indices = start.topk(8).indices

    def classes(logits: Tensor) -> Tensor:
        import torch

        others = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat((logits.gather(-1, indices), others), -1)

    return _compared(
        lambda x: fastdistil.student_topk_logit_loss(x, teacher.to(device), k=8, backend=backend),
        lambda x: _kl(classes(teacher.double()), classes(x)),
        start,
        device,
    )


def _projected_cases() -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (101, 131) with empty rows, a teacher's logits and a student's, near them in the student's columns."""
    import torch

    matrix = torch.zeros(101, 131, dtype=torch.float64)
    for i in range(3):
        matrix[torch.arange(90), (torch.arange(90) * (i + 1)) % 131] += 1 + i
    teacher = _drawn(4, 131, scale=4)
    mapped = teacher.double().softmax(-1) @ matrix.T
    return matrix, teacher, mapped.clamp(min=1e-3).log().float() + _drawn(4, 101, scale=NEAR)


def _projected_formula(logits: Tensor, matrix: Tensor, teacher: Tensor) -> Tensor:
    mapped = matrix.any(-1)
    return _kl(logits[:, mapped], (teacher.double().softmax(-1) @ matrix.T)[:, mapped].log())


def _projected(backend: str, device: str) -> float:
    import fastdistil

    matrix, teacher, student = _projected_cases()
    projection = fastdistil.VocabProjection.of(matrix.to_sparse()).to(device)
    return _compared(
        lambda x: fastdistil.projected_logit_loss(x, teacher.to(device), projection, backend=backend),
        lambda x: _projected_formula(x, matrix, teacher),
        student,
        device,
    )


def _linear_projected(backend: str, device: str) -> float:
    import fastdistil

    matrix, _, _ = _projected_cases()
    projection = fastdistil.VocabProjection.of(matrix.to_sparse()).to(device)
    head, states, other = _drawn(101, 16), _drawn(4, 12), _drawn(131, 12)
    given = [x.to(device) for x in (head, states, other)]
    return _compared(
        lambda x: fastdistil.linear_projected_logit_loss(x, given[0], given[1], given[2], projection, backend=backend),
        lambda x: _projected_formula(x @ head.double().T, matrix, states.double() @ other.double().T),
        _drawn(4, 16),
        device,
    )


def _uld_formula(student: Tensor, teacher: Tensor) -> Tensor:
    """Where the teacher has more columns."""
    p, q = (x.softmax(-1).sort(-1, descending=True).values for x in (student, teacher.double()))
    width = p.shape[-1]
    return ((p - q[:, :width]).abs().sum(-1) + q[:, width:].sum(-1)).mean()


def _uld(backend: str, device: str) -> float:
    import fastdistil

    teacher = _drawn(4, 1100, scale=4)
    return _compared(
        lambda x: fastdistil.uld_loss(x, teacher.to(device), backend=backend),
        lambda x: _uld_formula(x, teacher),
        teacher[:, :1031].flip(-1) + _drawn(4, 1031, scale=NEAR, seed=1),
        device,
    )


def _linear_uld(backend: str, device: str) -> float:
    import fastdistil

    head, states, other = _drawn(101, 16), _drawn(4, 12), _drawn(131, 12)
    given = [x.to(device) for x in (head, states, other)]
    return _compared(
        lambda x: fastdistil.linear_uld_loss(x, *given, backend=backend),
        lambda x: _uld_formula(x @ head.double().T, states.double() @ other.double().T),
        _drawn(4, 16),
        device,
    )


def _hidden(backend: str, device: str) -> float:
    import fastdistil

    teacher = _drawn(4, 65)
    return _compared(
        lambda x: fastdistil.hidden_loss(x, teacher.to(device), backend=backend),
        lambda x: (x - teacher.double()).square().mean(),
        teacher + _drawn(4, 65, scale=NEAR, seed=1),
        device,
    )


def _attention(backend: str, device: str) -> float:
    import fastdistil

    shape = (2, 2, 9, 8)
    keys, *teacher = (_drawn(*shape, seed=i) for i in range(3))
    given = [x.to(device) for x in (keys, *teacher)]
    q, k, t = (x.double() for x in (teacher[0], teacher[1], keys))
    return _compared(
        lambda x: fastdistil.attention_loss(x, *given, kind="prob_kl", backend=backend),
        lambda x: _kl(x @ t.mT * shape[-1] ** -0.5, q @ k.mT * shape[-1] ** -0.5),
        _drawn(*shape, seed=3),
        device,
    )


def _relation(backend: str, device: str) -> float:
    import fastdistil

    teacher, scale = _drawn(2, 9, 8), 8**-0.5
    return _compared(
        lambda x: fastdistil.relation_loss(x, teacher.to(device), relation_heads=1, backend=backend),
        lambda x: _kl(x @ x.mT * scale, teacher.double() @ teacher.double().mT * scale),
        _drawn(2, 9, 8, seed=1),
        device,
    )


def _sparse_adamw(backend: str, device: str) -> float:
    """One step from the same gradient as torch.optim.AdamW's; infinite where an entry outside of the mask moved."""
    import torch

    from fastdistil.sparse import SparseAdamW

    start, gradient, positions = _drawn(257), _drawn(257, seed=1), torch.arange(0, 257, 3)
    ours = torch.nn.Parameter(start.to(device))
    exact = torch.nn.Parameter(start.double())
    ours.grad, exact.grad = gradient.to(device), gradient.double()
    SparseAdamW([("w", ours)], {"w": positions.to(device)}, lr=0.1, weight_decay=0.1, backend=backend).step()
    torch.optim.AdamW([exact], lr=0.1, weight_decay=0.1).step()
    moved = ours.detach().cpu().double()
    outside = torch.ones(257, dtype=torch.bool)
    outside[positions] = False
    if not torch.equal(moved[outside], start[outside].double()):
        return float("inf")
    truth = exact.detach()[positions]
    return float((moved[positions] - truth).norm() / truth.norm())


def _select_topk(backend: str, device: str) -> float:
    """0 where the positions are those of a sort, else infinite."""
    import torch

    from fastdistil.sparse import select_topk

    if backend == "triton":
        raise ValueError("backend 'triton' has no kernel that selects")
    start, moved = torch.zeros(2, 517), _drawn(2, 517)
    mask = select_topk({"w": moved.to(device)}, {"w": start.to(device)}, k=80, backend=backend)
    wanted = moved.abs().flatten().topk(80).indices.sort().values
    return 0.0 if torch.equal(mask["w"].cpu().long(), wanted) else float("inf")


CHECKS: dict[str, Callable[[str, str], float]] = {
    "logit_loss": _logit,
    "linear_logit_loss": _linear_logit,
    "topk_logit_loss": _topk,
    "linear_topk_logit_loss": _linear_topk,
    "student_topk_logit_loss": _student_topk,
    "projected_logit_loss": _projected,
    "linear_projected_logit_loss": _linear_projected,
    "uld_loss": _uld,
    "linear_uld_loss": _linear_uld,
    "hidden_loss": _hidden,
    "attention_loss": _attention,
    "relation_loss": _relation,
    "SparseAdamW": _sparse_adamw,
    "select_topk": _select_topk,
}
