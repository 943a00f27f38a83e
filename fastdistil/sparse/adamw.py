"""AdamW on the masked entries of a model: state for those alone, everything else bit-identical."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistil.contracts.sparse import UpdateConstants, UpdateRow
from fastdistil.losses._check import number
from fastdistil.sparse._check import Named, float_param, named_tensors
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.names import all_names, by_parameter, found_name, same_positions
from fastdistil.sparse.select import kernels

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_STATE = ("exp_avg", "exp_avg_sq", "master", "base")  # vectors with an entry for each one that is trained


class SparseAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW for the entries of a mask; the parameters that the mask does not name are updated densely.

    In a masked parameter everything outside of the mask stays bit for bit what it was, also under weight decay; inside,
    the numbers are those of torch.optim.AdamW. State: two float32 per entry (float64 for float64 parameters), one more,
    the master, for 16-bit parameters, one more under `l1`. Someone else may write the parameters between two steps: a
    master that no longer rounds to its parameter gives way. On a GPU all tensors of a step share one launch. Source:
    Ansell et al. 2022 (arXiv 2110.07560); the update is Loshchilov & Hutter 2019 (arXiv 1711.05101).

    Args:
        named_params: a module, a mapping, pairs of name and parameter, or a list of groups as torch.optim takes them,
            whose "params" are pairs. Parameters are dense float32, bfloat16, float16 or float64.
        mask: maps names to sorted flat positions (a SparseMask, or any mapping); it may name a tied parameter by any
            name that `named_params` has for it, which are all of them in a module.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW. They and l1 may differ from group to group and be changed
            by a scheduler.
        l1: adds l1 / n * sum |w - w0| over the n entries of the mask to the loss, w0 being the values at construction.
        step_in_backward: updates each parameter as soon as its gradient is complete and frees the gradient at once, so
            that no more than a few gradients exist together; call `step()` after each backward all the same (schedulers
            expect it). Nothing may then need all gradients at once or twice: no clipping, no GradScaler, no
            accumulation. The hooks end with `remove_hooks()` or the optimizer's life.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError, ValueError: naming the parameter, where it does not fit the mask, is not dense, or has a sparse
            gradient.
        RuntimeError: under step_in_backward, a second gradient before `step()`.

    Example:
        >>> import torch
        >>> from fastdistil.sparse import SparseAdamW
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = SparseAdamW(model.named_parameters(), {"weight": torch.tensor([0, 2])}, lr=0.1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> (model.weight != before).tolist()
        [[True, False, True, False]]
    """

    def __init__(
        self,
        named_params: Named | Iterable[dict[str, Any]],
        mask: Mapping[str, Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        l1: float = 0.0,
        step_in_backward: bool = False,
        backend: str = "auto",
    ) -> None:
        groups = _groups(named_params)
        if not isinstance(mask, Mapping):
            raise TypeError(
                f"SparseAdamW: mask is {type(mask).__name__}, expected a SparseMask or a mapping of names to positions"
            )
        self._masked: dict[str, str] = {}  # first name of a parameter -> its name in the mask
        shapes = dict[str, torch.Size]()
        for group in groups:
            params = group["params"]
            known = [name for name in mask if name in params]
            self._masked |= by_parameter("SparseAdamW", "mask", known, params, same_positions(mask))
            shapes |= {name: params[name].shape for name in known}
        for name in mask:
            if name not in shapes:
                raise ValueError(
                    f"SparseAdamW: mask has {name!r}, which named_params has not (a tied parameter has all of its "
                    "names in a module, or in named_parameters(remove_duplicate=False))"
                )
        if len(self._masked) < len(mask):  # it holds a tied parameter under two names
            mask = {name: mask[name] for name in self._masked.values()}
        self.mask = mask if isinstance(mask, SparseMask) else SparseMask(mask, shapes)
        self._index: dict[Tensor, Tensor | None] = {}
        self._place: dict[Tensor, tuple[int, str]] = {}  # group's number, name
        self._updated: set[Tensor] = set()  # in backward, since the last step()
        self._backend, self._in_backward = backend, step_in_backward
        self._hooks = list[torch.utils.hooks.RemovableHandle]()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "l1": l1}
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's, for pairs of name and parameter."""
        params = named_tensors("SparseAdamW", "named_params", param_group["params"])
        for name in params:
            masked = found_name(self.mask, all_names(params, name))
            if masked is not None:
                self._masked.setdefault(name, masked)
        super().add_param_group({**param_group, "params": list(params.items())})
        group = self.param_groups[-1]
        _check_numbers(group)
        for name, param in zip(group["param_names"], group["params"], strict=True):
            float_param("SparseAdamW", "named_params", name, param)
            if not param.is_contiguous():
                raise ValueError(f"SparseAdamW: named_params[{name!r}] has strides {param.stride()}, expected it dense")
            masked = self._masked.get(name)
            if masked is not None and self.mask.shapes[masked] != param.shape:
                raise ValueError(
                    f"SparseAdamW: named_params[{name!r}] has shape {tuple(param.shape)}, expected "
                    f"{tuple(self.mask.shapes[masked])} to match mask"
                )
            self._index[param] = None if masked is None else self.mask[masked]
            self._place[param] = (len(self.param_groups) - 1, name)
            if group["l1"] and masked is not None:
                self.state[param]["base"] = self._entries(param)
            self._add_hook(param)

    def _add_hook(self, param: Any) -> None:
        if self._in_backward and param.requires_grad:
            hook = _backward_hook(weakref.ref(self))
            self._hooks.append(param.register_post_accumulate_grad_hook(hook))

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle, together with the model: torch.optim's knows nothing of the mask."""
        own = ("mask", "_masked", "_index", "_place", "_backend", "_in_backward")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "mask" in state:  # a copy, whose parameters have no hooks yet; load_state_dict comes here as well
            self._updated, self._hooks = set(), []
            for param in self._place:
                self._add_hook(param)

    @property
    def step_in_backward(self) -> bool:
        """Whether gradients are used and freed inside of the backward, so that nobody else sees them."""
        return self._in_backward

    def remove_hooks(self) -> None:
        """End `step_in_backward`: gradients stay where they are until `step()`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._in_backward = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._updated.clear()
        self._update([param for group in self.param_groups for param in group["params"] if param.grad is not None])
        return loss

    def _update(self, params: Sequence[Tensor]) -> None:
        by_device: dict[torch.device, list[UpdateRow]] = {}
        known: dict[tuple[int, float], UpdateConstants] = {}  # parameters of a group are mostly at the same step
        for param in params:
            row = self._row(param, known)
            if row is not None:
                by_device.setdefault(param.device, []).append(row)
        for device, rows in by_device.items():
            kernels(device, self._backend).sparse_update_(rows)

    def _entries(self, param: Tensor) -> Tensor:
        """The trained entries of a parameter in the precision of its state."""
        index = self._moved_index(param)
        dense = param.detach()
        if index is None:
            taken = dense.reshape(-1).clone()
        else:
            taken = kernels(param.device, self._backend).sparse_take(dense, index)
        return taken.to(_state_dtype(param))

    def _moved_index(self, param: Tensor) -> Tensor | None:
        """The parameter's positions where the parameter is now: a model may move after its optimizer was made."""
        index = self._index[param]
        if index is not None and index.device != param.device:
            index = self._index[param] = index.to(param.device)
        return index

    def _row(self, param: Tensor, known: dict[tuple[int, float], UpdateConstants]) -> UpdateRow | None:
        """One parameter's part of this step, its state made where there is none; None where nothing is trained."""
        group, name = self._place[param]
        gradient, index = param.grad, self._moved_index(param)
        if gradient is None or (index is not None and len(index) == 0) or param.numel() == 0:
            return None
        if gradient.layout != torch.strided or gradient.dtype != param.dtype:
            came = f"{gradient.layout} {gradient.dtype}"
            raise ValueError(f"SparseAdamW: the gradient of {name!r} is {came}, expected dense {param.dtype}")
        state = self._fitting_state(param, name)
        state["step"] += 1.0
        at = (group, state["step"])
        if at not in known:
            known[at] = self._constants(self.param_groups[group], at[1])
        base = None
        if known[at].l1 and index is not None:
            if "base" not in state:
                raise ValueError(f"SparseAdamW: {name!r} has got an l1 since construction, expected it there or never")
            base = state["base"]
        return UpdateRow(
            param, gradient.contiguous(), index, state["exp_avg"], state["exp_avg_sq"], state.get("master"), base,
            known[at],
        )  # fmt: skip

    def _fitting_state(self, param: Tensor, name: str) -> dict[str, Any]:
        """A parameter's state where the parameter is. The kernels are given addresses: what does not fit any more is
        an error here."""
        state: dict[str, Any] = self.state[param]
        index = self._index[param]
        if not param.is_contiguous() or (index is not None and param.shape != self._mask_shape(name)):
            raise ValueError(
                f"SparseAdamW: {name!r} has become {tuple(param.shape)} with strides {param.stride()}, expected it "
                "dense and of the shape that it had"
            )
        if "step" not in state:
            self._begin(param, state)
        if index is None and state["exp_avg"].numel() != param.numel():
            raise ValueError(f"SparseAdamW: {name!r} has {param.numel()} elements, but a state of another number")
        for key in _STATE:  # a model may move after its optimizer was made
            if key in state and state[key].device != param.device:
                state[key] = state[key].to(param.device)
        return state

    def _mask_shape(self, name: str) -> torch.Size:
        return self.mask.shapes[self._masked[name]]

    def _begin(self, param: Tensor, state: dict[str, Any]) -> None:
        """A parameter's state before its first step. The step is a number: a tensor would cost more than the rest of
        what Python does here."""
        index = self._moved_index(param)
        count = param.numel() if index is None else len(index)
        state["step"] = 0.0
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros(count, dtype=_state_dtype(param), device=param.device)
        if param.dtype in _SIXTEEN_BITS:
            state["master"] = self._entries(param)

    def _constants(self, group: dict[str, Any], step: float) -> UpdateConstants:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return UpdateConstants(
            decay=1 - lr * group["weight_decay"],
            one_minus_beta1=1 - beta1,
            beta2=beta2,
            one_minus_beta2=1 - beta2,
            eps=group["eps"],
            step_size=lr / (1 - beta1**step),
            inv_bias2_sqrt=(1 - beta2**step) ** -0.5,
            l1=group["l1"] / max(self.mask.nnz, 1) if group["l1"] else 0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, and under "mask" a digest of the mask that the state belongs to."""
        return {**super().state_dict(), "mask": self.mask.digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where the state belongs to another mask or other parameters; nothing is loaded then."""
        if state_dict.get("mask") != self.mask.digest():
            raise ValueError(
                f"SparseAdamW.load_state_dict: state_dict was saved with mask {state_dict.get('mask')!r}, expected "
                f"{self.mask.digest()!r}"
            )
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            raise ValueError("SparseAdamW.load_state_dict: state_dict has other parameter groups than this optimizer")
        params = dict(zip((i for g in saved for i in g["params"]), (p for g in own for p in g["params"]), strict=True))
        kept: dict[Tensor, dict[str, Tensor]] = {}
        for key, state in state_dict["state"].items():
            param = params[key]
            index, name = self._index[param], self._place[param][1]
            count = param.numel() if index is None else len(index)
            kept[param] = {name_: state[name_] for name_ in _STATE if name_ in state}
            for name_, value in kept[param].items():
                if value.shape != (count,):
                    raise ValueError(
                        f"SparseAdamW.load_state_dict: {name_} of {name!r} has shape {tuple(value.shape)}, expected "
                        f"({count},)"
                    )
        super().load_state_dict(state_dict)
        for param, vectors in kept.items():  # torch.optim has cast them to the parameter's dtype
            for name_, value in vectors.items():
                moved = value.detach().to(param.device, _state_dtype(param), copy=True)
                self.state[param][name_] = moved


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _groups(named_params: Any) -> list[dict[str, Any]]:
    """torch.optim's groups, with parameters by name; frozen ones stay, they may thaw."""
    if isinstance(named_params, (list, tuple)) and named_params and all(isinstance(g, dict) for g in named_params):
        parts = list(named_params)
    else:
        parts = [{"params": named_params}]
    groups = [{**part, "params": named_tensors("SparseAdamW", "named_params", part["params"])} for part in parts]
    if len(groups) == 1 and not groups[0]["params"]:
        raise ValueError("SparseAdamW: named_params is empty")
    return groups


def _check_numbers(group: dict[str, Any]) -> None:
    for name in ("eps", "weight_decay", "l1"):
        if number("SparseAdamW", name, group[name]) < 0:
            raise ValueError(f"SparseAdamW: {name} is {group[name]}, expected at least 0")
    if not isinstance(group["lr"], Tensor) and number("SparseAdamW", "lr", group["lr"]) < 0:
        raise ValueError(f"SparseAdamW: lr is {group['lr']}, expected at least 0")
    betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else ()
    if len(betas) != 2 or not all(0 <= number("SparseAdamW", "betas", beta) < 1 for beta in betas):
        raise ValueError(f"SparseAdamW: betas is {group['betas']}, expected two numbers from 0 to below 1")


def _backward_hook(owner: weakref.ref[SparseAdamW]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def hook(param: Tensor) -> None:
        optimizer = owner()
        if optimizer is None:
            return
        if param in optimizer._updated:
            name = optimizer._place[param][1]
            raise RuntimeError(
                f"SparseAdamW: {name!r} got a second gradient before step(); accumulation needs step_in_backward=False"
            )
        optimizer._updated.add(param)
        optimizer._update([param])
        param.grad = None

    return hook
