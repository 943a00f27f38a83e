"""Inputs of a case, the textbook formula of its loss, and the truth: that formula in float64, a few items at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.work import Outcome, Tensors
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}  # float64 entries of a chunk's largest tensor: 512 MiB, 2 GiB
SAMPLED = 64  # items whose gradient is compared


@dataclass
class Problem:
    """`tensors` have items (rows, or sentences) along axis 0, over which the loss is a mean, but for those `shared`."""

    tensors: Tensors
    wanted: tuple[str, ...]  # gradients
    shared: tuple[str, ...] = ()

    @property
    def items(self) -> int:
        return next(x.shape[0] for name, x in self.tensors.items() if name not in self.shared)

    def pick(self, index: Tensor | slice) -> Problem:
        tensors = {name: x if name in self.shared else x[index] for name, x in self.tensors.items()}
        return replace(self, tensors=tensors)


def make(case: Case, device: str, noise: float, seed: int = 0) -> Problem:
    """student = teacher + noise, the same numbers for every implementation and process."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    s = case.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def pair(teacher: Tensor) -> tuple[Tensor, Tensor]:
        student = normal(*teacher.shape).mul_(noise).add_(teacher)
        return student.to(dtype), teacher.to(dtype)

    if case.op == "logits":
        student, teacher = pair(normal(s["N"], s["V"]).mul_(4.0))  # logits of std 4
        return Problem({"student": student, "teacher": teacher}, ("student",))
    if case.op == "topk":
        student, teacher = pair(normal(s["N"], s["V"]).mul_(4.0))
        known = [
            (rows.float() / case.options["temperature"]).log_softmax(-1).topk(s["K"]) for rows in teacher.split(64)
        ]
        values, indices = (torch.cat([x[i] for x in known]) for i in range(2))
        return Problem({"student": student, "values": values, "indices": indices}, ("student",))
    tensors: Tensors = {}
    if case.op == "linear":
        return _heads(case, normal, noise, dtype)
    if case.op == "attention":
        size = (s["B"], s["H"], s["S"])
        tensors["student_q"], tensors["teacher_q"] = pair(normal(*size, s["d_t"]))
        tensors["student_k"], tensors["teacher_k"] = pair(normal(*size, s["d_t"]))
        return Problem(tensors, ("student_q", "student_k"))
    wanted, shared = [], []
    for i in range(s["L"]):
        student = normal(s["N"], s["D_s"])
        projected = student
        if case.options["projection"]:
            projection = normal(s["D_t"], s["D_s"]).div_(math.sqrt(s["D_s"])).to(dtype)
            tensors[f"projection_{i}"] = projection
            shared.append(f"projection_{i}")
            projected = student @ projection.float().T
        teacher = normal(s["N"], s["D_t"]).mul_(noise).add_(projected)
        tensors[f"student_{i}"], tensors[f"teacher_{i}"] = student.to(dtype), teacher.to(dtype)
        wanted.append(f"student_{i}")
    return Problem(tensors, (*wanted, *shared), tuple(shared))


def _heads(case: Case, normal: Callable[..., Tensor], noise: float, dtype: torch.dtype) -> Problem:
    """Logits of std 4; a narrower student has the teacher's first columns, and of the rest the teacher has `noise`."""
    s = case.shape
    hidden, weight = normal(s["N"], s["D_t"]), normal(s["V"], s["D_t"]).mul_(4 * s["D_t"] ** -0.5)
    hidden[:, s["D_s"] :] *= noise
    student_hidden = hidden[:, : s["D_s"]] + normal(s["N"], s["D_s"]).mul_(noise)
    tensors = {
        "student_hidden": student_hidden.to(dtype),
        "student_weight": weight[:, : s["D_s"]].to(dtype).contiguous(),
        "teacher_hidden": hidden.to(dtype),
        "teacher_weight": weight.to(dtype),
    }
    wanted = ("student_hidden",) if case.options.get("frozen") else ("student_hidden", "student_weight")
    return Problem(tensors, wanted, ("student_weight", "teacher_weight"))


def layers(x: Tensors, name: str) -> list[Tensor]:
    return [x[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in x))]


def textbook(case: Case) -> Callable[[Tensors], Tensor]:
    """The loss as one writes it in PyTorch: eager baseline in the case's dtype, truth in float64."""
    if case.op == "logits":
        return _logits(case.options["divergence"], case.options["temperature"])
    if case.op == "linear":
        return _linear(case.options["divergence"], case.options["temperature"])
    if case.op == "topk":
        return _topk_bucket(case.options["temperature"])
    if case.op == "hidden":
        return _hidden_mse
    return _attention(case.options["kind"])


def _logits(divergence: str, temperature: float) -> Callable[[Tensors], Tensor]:
    def forward_kl(x: Tensors) -> Tensor:
        p, q = (F.log_softmax(x[name] / temperature, dim=-1) for name in ("student", "teacher"))
        return F.kl_div(p, q, reduction="batchmean", log_target=True) * temperature**2

    def jsd(x: Tensors) -> Tensor:
        p, q = (F.log_softmax(x[name] / temperature, dim=-1) for name in ("student", "teacher"))
        m = torch.logaddexp(p, q) - math.log(2.0)
        forth = F.kl_div(m, q, reduction="batchmean", log_target=True)
        back = F.kl_div(m, p, reduction="batchmean", log_target=True)
        return 0.5 * (forth + back) * temperature**2

    def reverse_kl(x: Tensors) -> Tensor:
        p, q = (F.log_softmax(x[name] / temperature, dim=-1) for name in ("student", "teacher"))
        return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2

    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}[divergence]


def _linear(divergence: str, temperature: float) -> Callable[[Tensors], Tensor]:
    def loss(x: Tensors) -> Tensor:
        heads = {w: F.linear(x[f"{w}_hidden"], x[f"{w}_weight"]) for w in ("student", "teacher")}
        if divergence == "mse":
            return F.mse_loss(heads["student"] / temperature, heads["teacher"] / temperature) * temperature**2
        return _logits(divergence, temperature)(heads)

    return loss


def _topk_bucket(temperature: float) -> Callable[[Tensors], Tensor]:
    def forward_kl(x: Tensors) -> Tensor:
        a, log_q = x["student"] / temperature, x["values"]
        log_p = a.gather(-1, x["indices"]) - a.logsumexp(-1, keepdim=True)
        p_rest, q_rest = (torch.log1p(-y.exp().sum(-1)) for y in (log_p, log_q))
        rows = (log_q.exp() * (log_q - log_p)).sum(-1) + q_rest.exp() * (q_rest - p_rest)
        return rows.mean() * temperature**2

    return forward_kl


def _hidden_mse(x: Tensors) -> Tensor:
    students, projections = layers(x, "student"), layers(x, "projection")
    if projections:
        students = [F.linear(h, p) for h, p in zip(students, projections, strict=True)]
    teachers = layers(x, "teacher")
    return torch.stack([F.mse_loss(h, t) for h, t in zip(students, teachers, strict=True)]).mean()


def _attention(kind: str) -> Callable[[Tensors], Tensor]:
    def loss(x: Tensors) -> Tensor:
        a, b = (
            x[f"{w}_q"] @ x[f"{w}_k"].transpose(-1, -2) * x[f"{w}_q"].shape[-1] ** -0.5 for w in ("student", "teacher")
        )
        if kind == "score_mse":
            return F.mse_loss(a, b)
        if kind == "prob_mse":
            return F.mse_loss(torch.softmax(a, -1), torch.softmax(b, -1))
        p, q = F.log_softmax(a, -1), F.log_softmax(b, -1)
        rows = p.shape[0] * p.shape[1] * p.shape[2]
        return F.kl_div(p, q, reduction="sum", log_target=True) / rows

    return loss


def sample(problem: Problem) -> Tensor:
    """Items from the first to the last one, so that offsets beyond 2^31 are met where there are any."""
    count = min(problem.items, SAMPLED)
    return torch.linspace(0, problem.items - 1, count).round().long()


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def mse_of_heads(x: Tensors) -> Tensor:
    """The textbook's mse of two heads multiplied out, |H W^T - G U^T|^2 = <H^T H, W^T W> - 2 <H^T G, W^T U> + ...

    It needs no logits, and the temperature cancels. Near convergence its terms do, too, but for a millionth: ten digits
    are left of float64's sixteen.
    """
    (h, w), (g, u) = ((x[f"{side}_hidden"], x[f"{side}_weight"]) for side in ("student", "teacher"))
    total = ((h.T @ h) * (w.T @ w)).sum() - 2 * ((h.T @ g) * (w.T @ u)).sum() + ((g.T @ g) * (u.T @ u)).sum()
    return total / (h.shape[0] * w.shape[0])


def truth(case: Case, problem: Problem) -> Outcome:
    """The textbook formula in float64; gradients of the sampled items, of the whole tensor where it is shared."""
    device = next(iter(problem.tensors.values())).device
    s = case.shape
    each = s["V"] if "V" in s else {"hidden": s.get("D_t", 0) * s.get("L", 0)}.get(case.op)
    each = s["H"] * s["S"] ** 2 if each is None else each  # float64 entries an item
    step = max(1, CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"] // each)
    formula, sampled, value = textbook(case), sample(problem).to(device), 0.0
    if case.op == "linear" and case.options["divergence"] == "mse":
        formula, step = mse_of_heads, problem.items
    kept: dict[str, list[Tensor]] = {name: [] for name in problem.wanted}
    shared = {name: _wide(problem.tensors[name]) for name in problem.shared}  # once: heads are large
    for start in range(0, problem.items, step):
        part = problem.pick(slice(start, start + step))
        tensors = shared | {n: _wide(x) for n, x in part.tensors.items() if n not in shared}
        for name in problem.wanted:
            tensors[name].requires_grad_()
        loss = formula(tensors) * (part.items / problem.items)
        value += loss.item()
        here = sampled[(sampled >= start) & (sampled < start + part.items)] - start
        for name, gradient in zip(
            problem.wanted, torch.autograd.grad(loss, [tensors[n] for n in problem.wanted]), strict=True
        ):
            if name not in problem.shared:
                kept[name].append(gradient[here])
            elif kept[name]:
                kept[name][0] += gradient
            else:
                kept[name].append(gradient)
    gradients = {name: torch.cat(parts) for name, parts in kept.items()}
    return Outcome(value, gradients)
