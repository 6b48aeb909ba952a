"""AdamW for long value vectors, a chunk at a time.

The arithmetic is one pure function on fp32 chunks, `adamw_update`. This file is how a chunk is read
and written: moments in fp32 or in 8 bits (see `moments`), values in fp32 or in bf16. Temporaries
are a few chunks, whatever the length of the vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanlift.errors import UserError
from leanlift.ops import adamw_kernel
from leanlift.optim.arithmetic import adamw_update, round_stochastically, seed_of, uniform_noise
from leanlift.optim.moments import BLOCK, CHUNK, OwnMoments, own_moments

ROUNDINGS = ("stochastic", "nearest")


@dataclass(frozen=True)
class _Kept:
    """A state tensor that torch's `load_state_dict` shall not cast to its parameter's dtype."""

    tensor: Tensor


class SparseAdamW(Optimizer):
    """AdamW for contiguous fp32 or bf16 vectors, with bounded temporaries.

    State of a parameter with k entries: "step" (fp32 scalar on the CPU) and, flat,

    * float32: "exp_avg", "exp_avg_sq", fp32 [k];
    * 8bit: "exp_avg_codes", "exp_avg_sq_codes", uint8 [k], and "exp_avg_absmax",
      "exp_avg_sq_absmax", fp32 [ceil(k / 256)].

    All options belong to the parameter group. They are saved with the state, and loading brings
    back those that were saved.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: learning rate, ≥ 0.
        betas: decay rates of the moments, each in [0, 1).
        eps: added to the root of the second moment, ≥ 0.
        weight_decay: every step multiplies an offset by 1 - lr * weight_decay, ≥ 0.
        moments: "float32" or "8bit".
        rounding: how bf16 values are rounded, "stochastic" or "nearest"; fp32 values are not.
        seed: of the stochastic rounding.
        chunk: entries per piece of work, a multiple of 256. With fp32 values it does not change
            the result; with stochastic rounding it changes the noise.
        ops: "auto", "torch" or "triton": how a step is computed; see `ops.tile_ops`. Belongs to the
            machine: it is no option of a group and is not saved. Triton's kernel takes a vector
            whole, and draws other noise.

    Raises:
        UserError: an option out of its range, or a parameter of another dtype or layout.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        moments: str = "float32",
        rounding: str = "stochastic",
        seed: int = 0,
        chunk: int = CHUNK,
        ops: str = "auto",
    ) -> None:
        self._ops = ops
        self._places: dict[int, tuple[dict[str, Any], int]] = {}
        self._reserved: dict[int, dict[str, Any]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "rounding": rounding,
            "seed": seed,
            "chunk": chunk,
        }
        _check_options(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, after checking its options and parameters."""
        super().add_param_group(param_group)
        try:
            _check_options(self.param_groups[-1])
            for parameter in self.param_groups[-1]["params"]:
                _check_parameter(parameter)
        except UserError:
            self.param_groups.pop()
            raise
        self._find_places()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returned, or None.

        Raises:
            UserError: a gradient or a state of another size than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update(parameter, group, place)
                place += 1
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor, apply: Tensor | None = None) -> None:
        """Update one parameter from its gradient, as `step` would; nothing without a gradient.

        For updates during the backward pass: once the gradient is set to None, a later `step`
        leaves the parameter alone.

        Args:
            parameter: one of this optimizer's.
            apply: bool scalar on the parameter's device; where it is False, values and moments stay
                as they are, but the step is counted: see `uncount_step`. Triton's kernel reads it
                on the device; torch's way waits for it.

        Raises:
            UserError: a parameter that is in no group, or a gradient of another size.
        """
        place = self._place_of(parameter)
        self._update(parameter, *place, apply)

    def reserve(self, parameter: Tensor) -> None:
        """Make the moments of a parameter now, where it is, instead of at its first step, which
        takes these; nothing where it has some."""
        if not self.state.get(parameter) and id(parameter) not in self._reserved:
            moments = self._moments_of(parameter)
            made = moments.create(parameter.numel(), parameter.device)
            self._reserved[id(parameter)] = made

    def moments_of(self, parameter: Tensor) -> list[Tensor]:
        """The tensors that hold the moments of a parameter, reserved ones too; none before its
        first step otherwise."""
        state = self.state.get(parameter) or self._reserved.get(id(parameter), {})
        return [state[key] for key in self._moments_of(parameter).keys if state]

    def _moments_of(self, parameter: Tensor) -> OwnMoments:
        return own_moments(self._place_of(parameter)[0]["moments"])

    def _place_of(self, parameter: Tensor) -> tuple[dict[str, Any], int]:
        """The group of a parameter, and its place."""
        found = self._places.get(id(parameter))
        if found is None:
            raise UserError(
                "expected a parameter of this optimizer, got another tensor: add it with "
                "add_param_group first."
            )
        return found

    def uncount_step(self, parameter: Tensor) -> None:
        """Take back that a step was counted which `apply` did not allow."""
        self.state[parameter]["step"] -= 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of `state_dict` onto the parameters' devices; every tensor keeps its dtype.

        Raises:
            UserError: the state of another kind of moments, or of another number of entries.
        """
        kept = {
            key: {
                name: _Kept(held) if isinstance(held, Tensor) else held
                for name, held in state.items()
            }
            for key, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": kept})
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                for name, held in state.items():
                    if isinstance(held, _Kept):
                        device = torch.device("cpu") if name == "step" else parameter.device
                        state[name] = held.tensor.detach().to(device, copy=True)
                if state:
                    _check_state(state, parameter, group["moments"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_ops", "auto")  # what is pickled has groups and state alone
        self.__dict__.setdefault("_reserved", {})
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            _check_options(group)
        self._find_places()

    def _find_places(self) -> None:
        """Where each parameter stands, counted through all groups."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        self._places = {id(p): (group, place) for place, (p, group) in enumerate(pairs)}

    def _update(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        place: int,
        apply: Tensor | None = None,
    ) -> None:
        grad = parameter.grad
        if grad is None:
            return
        moments, chunk = own_moments(group["moments"]), group["chunk"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            reserved = self._reserved.pop(id(parameter), None)
            state.update(reserved or moments.create(parameter.numel(), parameter.device))
        _check_gradient(parameter, grad)
        _check_state(state, parameter, group["moments"])
        state["step"] += 1
        step = int(state["step"])
        options = (
            step,
            float(group["lr"]),
            group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        values, grads = parameter.detach().view(-1), grad.detach().reshape(-1)
        kernel = adamw_kernel(self._ops, parameter.device)
        if kernel is not None:
            stochastic = group["rounding"] == "stochastic"
            seed = seed_of(group["seed"], step, place) >> 33 if stochastic else None
            kernel(values, grads.contiguous(), moments.parts(state), *options, seed, apply)
            return
        if apply is not None and not bool(apply):
            return
        for start in range(0, values.numel(), chunk):
            stop = min(start + chunk, values.numel())
            held = values[start:stop]
            value = held.float()  # the values themselves where they are fp32
            piece = moments.chunk(state, start, stop)
            first, second = moments.read(piece)
            adamw_update(value, grads[start:stop].float(), first, second, *options)
            moments.write(piece, first, second)
            if held.dtype == torch.bfloat16:
                if group["rounding"] == "stochastic":
                    noise = uniform_noise(
                        stop - start, held.device, group["seed"], step, place, start // chunk
                    )
                    value = round_stochastically(value, noise)
                held.copy_(value)


# --- What a user can get wrong -------------------------------------------------------------


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise UserError(
                f"{name} must be 0 or more, got {group[name]}: choose another {name} for the "
                "optimizer."
            )
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(
            f"betas must be two numbers, each at least 0 and below 1, got {tuple(betas)}: choose "
            "for example (0.9, 0.95)."
        )
    own_moments(group["moments"])
    if group["rounding"] not in ROUNDINGS:
        raise UserError(
            f"rounding must be one of {', '.join(ROUNDINGS)}, got {group['rounding']!r}: choose "
            "one of them."
        )
    chunk = group["chunk"]
    if not isinstance(chunk, int) or chunk < BLOCK or chunk % BLOCK:
        raise UserError(
            f"chunk must be a positive multiple of {BLOCK} entries, got {chunk}: choose for "
            f"example {2**18}."
        )


def _check_parameter(parameter: Tensor) -> None:
    if parameter.dtype not in (torch.float32, torch.bfloat16) or not parameter.is_contiguous():
        layout = "contiguous" if parameter.is_contiguous() else "non-contiguous"
        raise UserError(
            "SparseAdamW expects contiguous float32 or bfloat16 parameters, got "
            f"{layout} {str(parameter.dtype).removeprefix('torch.')}: convert them first."
        )


def _check_gradient(parameter: Tensor, grad: Tensor) -> None:
    if grad.shape != parameter.shape:
        raise UserError(
            f"a gradient must have its parameter's shape {tuple(parameter.shape)}, got "
            f"{tuple(grad.shape)}: clear the gradients after the parameter was replaced."
        )


def _check_state(state: dict[str, Any], parameter: Tensor, moments: str) -> None:
    keys = own_moments(moments).keys
    if any(key not in state for key in keys):
        raise UserError(
            f"the optimizer's state should hold {moments} moments, got {', '.join(sorted(state))}: "
            "use the moments that the state was saved with."
        )
    count = state[keys[0]].numel()
    if count != parameter.numel():
        raise UserError(
            f"the optimizer's state should have {parameter.numel()} entries, got {count}: load the "
            "state that was saved with these parameters, or start without one."
        )
