"""Other people's losses that do the same work, each called as its own documentation has it.

Liger-Kernel        KL and JSD of logits, over torch's log_softmax; for two heads its fused linear JSD
orda-kernel         two heads; on a CPU it has no kernels, only its own plain PyTorch
flash-linear-attention   its fused KL of two heads: forward KL at temperature 1
torch               F.linear_cross_entropy (2.13 and later) against the teacher's probabilities, whose entropy taken off
                    makes it the forward KL; it works in chunks for labels alone, so with probabilities all logits exist

orda-kernel, flash-linear-attention and F.linear_cross_entropy begin at hidden states: they have no loss of logits.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.work import Tensors, Unavailable
from torch import Tensor

from fastdistil.backends import interpreting

Loss = Callable[[Tensors], Tensor]
HEADS = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")


def peer(name: str, case: Case, device: torch.device) -> Loss:
    """The loss that PEERS names. Raises Unavailable where its package, or such a loss, is not there."""
    return PEERS[name](case, device)


def _module(name: str, package: str) -> Any:
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise Unavailable(f"{package} is not installed (pip install {package})")
    try:
        return importlib.import_module(name)
    except Exception as error:  # other people's code, and whatever it needs
        raise Unavailable(f"{package} cannot be imported: {type(error).__name__}: {error}") from error


def _needs_gpu(package: str, device: torch.device) -> None:
    if device.type == "cpu" and not interpreting():
        raise Unavailable(f"{package} needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)")


def _liger_kl(case: Case, device: torch.device) -> Loss:
    module = _module("liger_kernel.transformers", "liger-kernel")
    _needs_gpu("liger-kernel", device)
    if case.op != "logits" or case.options["divergence"] != "forward_kl":
        raise Unavailable("liger-kernel has no such loss")
    return _of_log_softmax(module.LigerKLDIVLoss(reduction="batchmean", log_target=True), case)


def _liger_jsd(case: Case, device: torch.device) -> Loss:
    """Its JSD's beta 0 is the forward KL."""
    module = _module("liger_kernel.transformers", "liger-kernel")
    _needs_gpu("liger-kernel", device)
    if case.op not in ("logits", "linear") or case.options["divergence"] not in ("forward_kl", "jsd"):
        raise Unavailable("liger-kernel has no such loss")
    beta = 0.0 if case.options["divergence"] == "forward_kl" else 0.5
    if case.op == "logits":
        return _of_log_softmax(module.LigerJSD(beta=beta), case)
    if case.options["temperature"] != 1:
        raise Unavailable("liger-kernel's fused linear JSD has another factor for temperatures but 1")
    loss = module.LigerFusedLinearJSD(jsd_beta=beta)
    return lambda x: loss(*(x[name] for name in HEADS), None)


def _of_log_softmax(module: Any, case: Case) -> Loss:
    temperature = case.options["temperature"]

    def loss(x: Tensors) -> Tensor:
        p, q = (F.log_softmax(x[w] / temperature, -1) for w in ("student", "teacher"))
        found: Tensor = module(p, q) * temperature**2
        return found

    return loss


def _orda(case: Case, device: torch.device) -> Loss:
    module = _module("orda_kernel", "orda-kernel")
    kinds: dict[str, dict[str, Any]] = {
        "forward_kl": {"kl_divergence": "forward"},
        "jsd": {"kl_divergence": "skew_js", "kl_beta": 0.5},
    }
    if case.op != "linear" or case.options["divergence"] not in kinds:
        raise Unavailable("orda-kernel has no such loss")
    options: dict[str, Any] = {
        "student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0,
        "kl_temperature": float(case.options["temperature"]), "config": module.KernelConfig(assume_valid_labels=True),
        "backend": "torch" if device.type == "cpu" else "triton", **kinds[case.options["divergence"]],
    }  # fmt: skip
    labels = torch.zeros(case.shape["N"], dtype=torch.long, device=device)  # of no weight

    def loss(x: Tensors) -> Tensor:
        hidden, weight, *teacher = (x[name] for name in HEADS)
        found: Tensor = module.distillation_loss(
            hidden, weight, labels, module.SeparateTeacher(*teacher), **options
        ).loss
        return found

    return loss


def _fla(case: Case, device: torch.device) -> Loss:
    module = _module("fla.modules.fused_kl_div", "flash-linear-attention")
    _needs_gpu("flash-linear-attention", device)
    if case.op != "linear" or case.options["divergence"] != "forward_kl" or case.options["temperature"] != 1:
        raise Unavailable("flash-linear-attention has the forward KL of two heads at temperature 1 alone")
    loss = module.FusedKLDivLoss()
    return lambda x: loss(x["student_hidden"], x["teacher_hidden"], x["student_weight"], x["teacher_weight"])


def _linear_cross_entropy(case: Case, device: torch.device) -> Loss:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy, expected 2.13 or later")
    if case.op != "linear" or case.options["divergence"] != "forward_kl":
        raise Unavailable("F.linear_cross_entropy has the forward KL of two heads alone")
    temperature = case.options["temperature"]

    def loss(x: Tensors) -> Tensor:
        target = F.linear(x["teacher_hidden"] / temperature, x["teacher_weight"]).softmax(-1)
        entropy = -torch.xlogy(target, target).sum(-1).mean()
        found: Tensor = function(x["student_hidden"] / temperature, x["student_weight"], target) - entropy
        return found * float(temperature) ** 2

    return loss


# TRL's beta: 0 and 1 are the two KLs.
_TRL_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def _trl(case: Case, device: torch.device) -> Loss:
    op, temperature = case.op, float(case.options["temperature"])
    beta = _TRL_BETA.get(case.options.get("divergence", ""))
    if op not in ("logits", "linear") or beta is None:
        raise Unavailable("trl has no such loss")
    if op == "logits":
        function = _module("trl.experimental.gkd", "trl").GKDTrainer.generalized_jsd_loss

        def logits(x: Tensors) -> Tensor:
            found: Tensor = function(
                x["student"][None],
                x["teacher"][None],
                beta=beta,
                temperature=temperature,
                num_items_in_batch=len(x["student"]),
            )
            return found * temperature**2

        return logits
    chunked = _module("trl.trainer.distillation_trainer", "trl")._chunked_divergence_loss

    def heads(x: Tensors) -> Tensor:
        hidden, teacher = x["student_hidden"], x["teacher_hidden"]
        mask = torch.ones(1, len(hidden), dtype=torch.long, device=device)
        weights = x["student_weight"], x["teacher_weight"]
        found: Tensor = chunked(hidden[None], teacher[None], *weights, mask, beta, temperature=temperature)[0]
        return found * temperature**2

    return heads


PEERS: dict[str, Callable[[Case, torch.device], Loss]] = {
    "liger_kl": _liger_kl,
    "liger_jsd": _liger_jsd,
    "orda": _orda,
    "fla_kl": _fla,
    "linear_cross_entropy": _linear_cross_entropy,
    "trl": _trl,
}
