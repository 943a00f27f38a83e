"""Our losses in TRL's distillation trainers (looked at: trl 1.16.0), by mixins that stand before the trainer:

    class Trainer(GKDMixin, trl.experimental.gkd.GKDTrainer): ...

What each one replaces is the loss alone. Data, generation, teachers, logging and saving stay TRL's, and so does the
meaning of its options. TRL itself is imported by who names the trainer, and here inside of the methods that need it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastdistil.integrations.gold import UniversalLogitLoss
from fastdistil.losses import _check
from fastdistil.losses._heads import whole_head
from fastdistil.losses.linear_logit import linear_logit_loss
from fastdistil.losses.logit import logit_loss
from fastdistil.losses.student_topk import student_topk_logit_loss

__all__ = ["DistillationMixin", "GKDMixin", "GOLDMixin", "SelfDistillationMixin", "generalized_jsd_loss"]

# What the backbone of a model that reads images takes besides tokens.
_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    *,
    num_items_in_batch: Tensor | float | None = None,
    logits_are_probs: bool = False,
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss` and GOLD's, from `logit_loss`.

    Args:
        student_logits: (..., V); teacher_logits: the same shape.
        labels: (...,) int64, -100 where a row does not count.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalized JSD.
        temperature: divides both sides' logits; no factor T².
        reduction: "batchmean" (over the rows that count; without labels over the first dimension), "sum" or "mean"
            (over rows and columns).
        num_items_in_batch: replaces the divisor, whatever the reduction.
        logits_are_probs: GOLD's, which has to be False.

    Returns:
        A scalar, float32 (float64 where either side is).

    Raises:
        TypeError, ValueError: naming the argument; reduction="none", whose (..., V) terms are not formed here.

    Example:
        >>> import torch
        >>> from fastdistil.integrations.trl import generalized_jsd_loss
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> print(f"{generalized_jsd_loss(student, teacher, beta=0.0).item():.4f}")
        0.4205
    """
    name = "generalized_jsd_loss"
    if logits_are_probs:
        raise ValueError(f"{name}: logits_are_probs is True, expected False: the loss is made of logits")
    _check.one_of(name, "reduction", reduction, ("batchmean", "sum", "mean"))
    weight = None if labels is None else labels != -100
    items: Tensor | float | None = num_items_in_batch
    if isinstance(items, Tensor):
        items = items.to(student_logits.device)
    elif items is None and reduction == "batchmean" and labels is None:
        items = max(student_logits.shape[0], 1)
    mean = reduction != "sum" or items is not None
    loss: Tensor = logit_loss(
        student_logits, teacher_logits, **divergence_of(name, "beta", beta), temperature=temperature,
        scale_by_t2=False, weight=weight, reduction="mean" if mean else "sum", num_items=items,
    )  # fmt: skip
    return loss / student_logits.shape[-1] if reduction == "mean" and num_items_in_batch is None else loss


def divergence_of(function: str, name: str, beta: float) -> dict[str, Any]:
    """TRL's beta (SDFT and SDPO: alpha) as logit_loss's divergence and beta."""
    value = _check.number(function, name, beta)
    if not 0 <= value <= 1:
        raise ValueError(f"{function}: {name} is {value}, expected 0 <= {name} <= 1")
    if value in (0, 1):
        return {"divergence": "reverse_kl" if value else "forward_kl"}
    return {"divergence": "jsd", "beta": value}


class _LogitsMixin:
    """`compute_loss` of GKD and GOLD, from both models' logits or from their heads."""

    two_heads: bool = False
    chunk_bytes: int | None = None
    accelerator: Any
    beta: float
    teacher_model: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | float | None = None
    ) -> Any:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | self._forward_kwargs(inputs)
        # Position i predicts label i + 1. The weights are shifted: logits[:, :-1] would be copied.
        weight = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
        items = num_items_in_batch
        common = {
            **divergence_of(type(self).__name__, "beta", self.beta),
            "temperature": self._loss_temperature(),
            "scale_by_t2": False,
            "weight": weight,
            "num_items": items.to(weight.device) if isinstance(items, Tensor) else items,
        }
        self.teacher_model.eval()
        if self.two_heads and not return_outputs:  # an evaluation that looks at outputs needs the logits
            student = self.accelerator.unwrap_model(model)
            return _inside()(model, student, self._two_heads_loss, student, given, common)
        outputs = model(**given)
        with torch.no_grad():
            teacher_logits = self.teacher_model(**given).logits
        loss = logit_loss(outputs.logits, teacher_logits, **common)
        return (loss, outputs) if return_outputs else loss

    def _two_heads_loss(self, student: Any, given: dict[str, Any], common: dict[str, Any]) -> Tensor:
        name, teacher = type(self).__name__, self.accelerator.unwrap_model(self.teacher_model)
        with self.accelerator.autocast():  # which is else in the forward pass that is gone round here
            heads = head_arguments(name, "student", student, _last_hidden(name, student, given))
            with torch.no_grad():
                hidden = _inside()(self.teacher_model, teacher, _last_hidden, name, teacher, given)
                heads |= head_arguments(name, "teacher", teacher, hidden)
            loss: Tensor = linear_logit_loss(**heads, **common, chunk_bytes=self.chunk_bytes)
        return loss

    def _forward_kwargs(self, inputs: Any) -> dict[str, Any]:
        return {}

    def _loss_temperature(self) -> float:
        raise NotImplementedError


def _inside() -> Any:
    """TRL's way into a wrapped model's own methods: DistributedDataParallel and FSDP have to see a forward pass."""
    from trl.models.utils import _ForwardRedirection

    return _ForwardRedirection()


def _last_hidden(function: str, model: Any, given: dict[str, Any]) -> Tensor:
    """What the head of a model would get."""
    if hasattr(model, "peft_config"):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            raise ValueError(f"{function}: two_heads is True with prompt learning, whose tokens a backbone never sees")
        model = model.get_base_model()
    hidden: Tensor = model.base_model(**given, use_cache=False).last_hidden_state
    return hidden


class GKDMixin(_LogitsMixin):
    """For `trl.experimental.gkd.GKDTrainer`. `temperature` is that of sampling alone, as in TRL: a warning says so
    where it is not 1. A subclass may set `two_heads = True`, which makes the loss from hidden states and heads, with no
    logits in memory but `chunk_bytes` of them (None: the loss's default).

    Args:
        *args, **kwargs: the trainer's own.

    Raises:
        ValueError: beta outside [0, 1].

    Example:
        >>> from fastdistil.integrations.trl import GKDMixin
        >>> class Trainer(GKDMixin): ...  # and GKDTrainer as the second base
        >>> Trainer.generalized_jsd_loss.__name__
        'generalized_jsd_loss'
    """

    args: Any
    generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.temperature != 1:
            warnings.warn(
                f"GKDConfig.temperature = {self.args.temperature} is the temperature of sampling alone: the loss is at "
                "temperature 1, as TRL's own is",
                stacklevel=2,
            )

    def _loss_temperature(self) -> float:
        return 1.0


class GOLDMixin(_LogitsMixin):
    """For `trl.experimental.gold.GOLDTrainer`. `two_heads` and `chunk_bytes` as in `GKDMixin`, for models of one
    tokenizer. With use_uld_loss TRL aligns the tokens of both sides, and `uld_loss` compares the rows.

    Args:
        *args, **kwargs: the trainer's own.

    Raises:
        ValueError: use_uld_loss=True with uld_use_hybrid_loss, whose loss is TRL's own, or with two_heads.
    """

    args: Any
    temperature: float
    uld_loss_fn: Any
    generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.use_uld_loss:
            if self.args.uld_use_hybrid_loss:
                raise ValueError("GOLDMixin: uld_use_hybrid_loss is True, expected False: that part is TRL's own")
            if self.two_heads:
                raise ValueError("GOLDMixin: two_heads is True with use_uld_loss, expected False: TRL forms the logits")
            self.uld_loss_fn = UniversalLogitLoss(self.uld_loss_fn)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | float | None = None
    ) -> Any:
        if self.args.use_uld_loss:  # TRL's, which calls uld_loss_fn
            return super(_LogitsMixin, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _forward_kwargs(self, inputs: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._get_model_forward_kwargs(inputs)  # type: ignore[attr-defined]
        return found

    def _loss_temperature(self) -> float:
        return self.temperature


class SelfDistillationMixin:
    """For `trl.experimental.sdft.SDFTTrainer` and `trl.experimental.sdpo.SDPOTrainer` with distillation_mode
    "full_logits" or "topk_logits". The trainer has divided the logits by its temperature before, without a factor T².

    Args:
        *args, **kwargs: the trainer's own.

    Raises:
        ValueError: distillation_mode "sampled_token", which compares no distributions; use_teacher_server=True, whose
            loss is another method's; SDPO's distillation_weight 0, where there is no distillation.
    """

    args: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options, name = self.args, type(self).__name__
        _check.one_of(name, "distillation_mode", options.distillation_mode, ("full_logits", "topk_logits"))
        if options.use_teacher_server:
            raise ValueError(f"{name}: use_teacher_server is True, expected False: the server's loss is TRL's own")
        if getattr(options, "distillation_weight", 1) == 0:
            raise ValueError(f"{name}: distillation_weight is 0, expected more: there is no distillation to replace")
        if options.distillation_mode == "topk_logits" and options.distillation_topk is None:
            raise ValueError(f"{name}: distillation_topk is None, expected a number of columns for 'topk_logits'")

    def _compute_self_distillation_loss(self, model: Any, inputs: Any, distillation_logits: Any) -> Tensor:
        student, teacher = distillation_logits.student_logits, distillation_logits.teacher_logits
        mask = distillation_logits.loss_mask
        losses = self._row_losses(student, teacher, mask)
        old = inputs.get("old_per_token_logps")
        if self.args.distillation_is_clip is not None and old is not None:
            from trl.experimental.sdft.loss_utils import apply_importance_sampling_clipping
            from trl.trainer.utils import selective_log_softmax

            with torch.no_grad():  # the ratio is a constant
                now = selective_log_softmax(student, distillation_logits.completion_ids)
            losses = apply_importance_sampling_clipping(losses, now, old, self.args.distillation_is_clip)
        total = (losses * mask).sum(-1)
        counts = mask.sum(-1)
        mean = total.detach().sum() / counts.sum().clamp(min=1)
        self._log_self_distillation_metric(  # type: ignore[attr-defined]
            "train" if model.training else "eval", self.accelerator.gather(mean).mean().item()
        )
        loss: Tensor = (total / counts.clamp(min=1)).mean()
        return loss

    def _row_losses(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """The divergence of each completion token (B, C), 0 where the mask (B, C) is."""
        options = self.args
        rule = divergence_of(type(self).__name__, "distillation_alpha", options.distillation_alpha)
        common: dict[str, Any] = {**rule, "weight": mask != 0, "reduction": "none"}
        if options.distillation_mode == "full_logits":
            losses: Tensor = logit_loss(student, teacher, **common)
            return losses
        tail = "bucket" if options.distillation_add_tail else "renormalize"
        return student_topk_logit_loss(student, teacher, k=options.distillation_topk, tail=tail, **common)


class DistillationMixin:
    """For `trl.DistillationTrainer`: `linear_logit_loss` in the place of its chunked kernel. A subclass may set
    `chunk_bytes`, the bound of the memory for logits (None: the loss's default).

    Args:
        *args, **kwargs: the trainer's own.

    Raises:
        ValueError: a student without a teacher_model; heads that DeepSpeed's ZeRO-3 has split up.

    """

    chunk_bytes: int | None = None
    accelerator: Any
    beta: float
    temperature: float
    teacher_model: Any
    _forward_redirection: Any
    _get_last_hidden_state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.teacher_model is None:
            raise ValueError(f"{type(self).__name__}: teacher_model is None, expected a model: its head is read here")

    def _compute_loss(
        self, unwrapped_student: Any, inputs: Any, num_items_in_batch: Tensor | float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        weight, name = inputs["completion_mask"], type(self).__name__
        if "tool_mask" in inputs:
            weight = weight * inputs["tool_mask"]
        given = (tokens, attention, inputs["completion_ids"].size(1))
        images = {name: inputs[name] for name in _MULTIMODAL if name in inputs}

        student = self._get_last_hidden_state(unwrapped_student, *given, **images)
        self.teacher_model.eval()
        unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():  # through the wrapper, which has the weights of a split teacher at hand
            teacher = self._forward_redirection(
                self.teacher_model, unwrapped_teacher, self._get_last_hidden_state, unwrapped_teacher, *given, **images
            )
            teacher_head = head_arguments(name, "teacher", unwrapped_teacher, teacher)
        student_head = head_arguments(name, "student", unwrapped_student, student)
        device = student_head["student_weight"].device
        if teacher_head["teacher_weight"].device != device:
            raise ValueError(
                f"{name}: the teacher's head is on {teacher_head['teacher_weight'].device}, expected "
                f"{device}, where the student's is: see device_map"
            )
        weight, items = weight.to(device), num_items_in_batch
        loss, stats = linear_logit_loss(
            **student_head, **teacher_head, **divergence_of(name, "beta", self.beta),
            temperature=self.temperature, scale_by_t2=False, weight=weight, return_stats=True,
            chunk_bytes=self.chunk_bytes, num_items=items.to(device) if isinstance(items, Tensor) else items,
        )  # fmt: skip
        return loss, stats.student_entropy.sum(), (weight != 0).sum()


def logit_scale(config: Any) -> float:
    """What a model of this (text) configuration multiplies its logits by, under the names that TRL 1.16 knows."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def head_arguments(function: str, side: str, model: Any, hidden: Tensor) -> dict[str, Any]:
    """The arguments of linear_logit_loss that belong to one side."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"{function}: the {side}'s head has a PEFT adapter, expected none: leave it out of target_modules"
        )
    weight, bias = head.weight, getattr(head, "bias", None)
    if hasattr(weight, "ds_id"):
        raise ValueError(
            f"{function}: the {side}'s head is split by DeepSpeed's ZeRO-3, expected ZeRO-2 or FSDP2: nothing gathers "
            "it here"
        )
    if side == "teacher":  # which TRL leaves with parameters that require gradients
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    if hasattr(weight, "full_tensor"):
        weight = whole_head(function, f"{side}_weight", weight).to(hidden.dtype)
        bias = None if bias is None else whole_head(function, f"{side}_bias", bias)
    hidden, kind = hidden.to(weight.device), hidden.device.type
    if torch.is_autocast_enabled(kind):  # the losses switch autocast off; TRL's own projects in its dtype
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return {
        f"{side}_hidden": hidden,
        f"{side}_weight": weight,
        f"{side}_bias": bias,
        f"{side}_logit_scale": logit_scale(config),
        f"{side}_softcap": getattr(config, "final_logit_softcapping", None),
    }
