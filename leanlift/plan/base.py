"""Planning from a model's name: its configuration is read, and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, masking_utils
from transformers.initialization import no_init_weights
from transformers.integrations import moe

from leanlift.config import LiftConfig
from leanlift.errors import UserError, first_line
from leanlift.layers.lm_head import LIKELIHOOD, Objective
from leanlift.methods import SFT
from leanlift.plan.auto import auto_class, how_loaded
from leanlift.plan.method_loss import SCORED, generating_of, loss_of
from leanlift.plan.planner import Known, plan_step
from leanlift.plan.result import MemoryPlan
from leanlift.plan.settings import PlanSettings
from leanlift.plan.shapes import Planned
from leanlift.source import stored_quantization, without_mxfp4
from leanlift.weights.quantized import WeightFormat
from leanlift.weights.stored import requested_format

NOT_COUNTED = "what the part that sees keeps of its images is not counted."


def plan_memory(
    model: str | Path,
    config: LiftConfig | None = None,
    settings: PlanSettings | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    objective: Objective = LIKELIHOOD,
    revision: str | None = None,
    known: Known | None = None,
    images: bool = False,
    method: str = SFT,
) -> MemoryPlan:
    """What fine-tuning a model will need, without its weights.

    Args:
        model: hub name, checkpoint directory, or a bare config.json.
        config: what is trained; `LiftConfig()` if not given.
        settings: of the run; those of a run that is told nothing, on this machine, if not given.
        attn_implementation, trust_remote_code, revision: as in `from_pretrained`.
        objective: what a token costs.
        known: of earlier plans for this model and objective: what has been run is not run again.
        images: whether rows have some: the part that sees is there then, where a kind of model has
            a class without it. What it keeps of them is counted where the settings' largest
            batches have `seen` some, and the model's code runs over these.
        method: what rows are trained on by, one of `leanlift.methods`. Rows are those that the
            policy computes: of pairs, twice as many.

    Raises:
        UserError: no such model, one without targets, or settings that cannot be planned.
    """
    base = FakeBase.of(model, attn_implementation, trust_remote_code, revision, images)
    planned = base.planned(config or LiftConfig(), settings or PlanSettings())
    loss, generating = loss_of(method, objective), generating_of(method)
    with without_packing_search(), grouped_products():
        if images:
            plan = plan_over_images(planned, base.name, loss, known)
        else:
            plan = plan_step(planned, base.name, loss, known, generating)
    if method != SFT:
        plan.holds_for["method"] = method
    if planned.settings.on_cuda and method in SCORED:
        plan.notes.append(
            "every token of a row is scored here; on a GPU TRL scores those of completions alone, "
            "and takes less."
        )
    loaded = how_loaded(base.shape, images)
    if loaded is not None:
        plan.notes.append(loaded)
    return plan


UNSEEN = ("images cannot be planned",)


def plan_over_images(
    planned: Planned, name: str, loss: Callable[..., Tensor], known: Known | None = None
) -> MemoryPlan:
    """The plan of a step over rows with images, or, where none is at hand, or the model's code does
    not run over what stands for them, one that says that they are not counted; the arguments are
    those of `plan_step`."""
    seen = planned.settings.batch.seen
    known = {} if known is None else known
    if seen is not None and UNSEEN not in known:
        try:
            plan = plan_step(planned, name, loss, known)
            plan.notes.append(f"images: as large as the largest looked at, {seen.pixels}.")
            return plan
        except UserError:
            known[UNSEEN] = True
    plan = plan_step(_without_images(planned), name, loss, known)
    plan.notes.append(NOT_COUNTED)
    return plan


def _without_images(planned: Planned) -> Planned:
    settings = planned.settings
    train, evaluation = (
        None if batch is None else replace(batch, seen=None)
        for batch in (settings.largest, settings.largest_eval)
    )
    return replace(planned, settings=replace(settings, largest=train, largest_eval=evaluation))


@dataclass(frozen=True)
class FakeBase:
    """A base of which the configuration alone is known.

    Attributes:
        name: hub name or path.
        shape: its configuration.
        stored: how its checkpoint is quantized; None: not at all.
        attn_implementation, trust_remote_code: as in `from_pretrained`.
        images: whether rows have some: see `auto_class`.
    """

    name: str
    shape: Any
    stored: dict[str, Any] | None
    attn_implementation: str | None
    trust_remote_code: bool
    images: bool = False

    @classmethod
    def of(
        cls,
        model: str | Path,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        images: bool = False,
    ) -> FakeBase:
        """As `plan_memory` takes and refuses it."""
        try:
            shape: Any = AutoConfig.from_pretrained(
                model, revision=revision, trust_remote_code=trust_remote_code
            )
            stored = stored_quantization(shape, str(model))
            auto_class(shape, str(model), images)
        except UserError:
            raise
        except Exception as error:  # a config.json may hold anything; each class has own checks
            raise _unplannable(str(model), error) from error
        shape = without_mxfp4(shape) or shape
        if stored is not None:
            del shape.quantization_config
        return cls(str(model), shape, stored, attn_implementation, trust_remote_code, images)

    @property
    def tied(self) -> bool:
        """Whether embedding and output head are one tensor."""
        return bool(getattr(self.shape.get_text_config(), "tie_word_embeddings", False))

    def planned(self, config: LiftConfig, settings: PlanSettings) -> Planned:
        """What is planned of it."""
        build = partial(self.build, settings)
        skipped = (self.stored or {}).get("llm_int8_skip_modules")
        names = None if skipped is None else tuple(map(str, skipped))
        return Planned(build, config, self.format(settings), settings, names)

    def format(self, settings: PlanSettings) -> WeightFormat:
        """How the Linears are held: as they are stored, or as the settings ask for."""
        stored = self.stored
        if stored is None:
            return settings.requested_format
        return requested_format(
            bool(stored.get("load_in_4bit")),
            bool(stored.get("load_in_8bit")),
            str(stored.get("bnb_4bit_quant_type") or "fp4"),
            bool(stored.get("bnb_4bit_use_double_quant")),
            settings.dtype_name,
        )

    def build(self, settings: PlanSettings) -> Any:
        """The 16/32-bit model, under fake tensors."""
        dtype = settings.model_dtype
        try:
            with no_init_weights(), converting_anew():  # some look at what they put in
                model = auto_class(self.shape, self.name, self.images).from_config(
                    self.shape,
                    dtype=dtype,
                    attn_implementation=self.attn_implementation,
                    trust_remote_code=self.trust_remote_code,
                )
            model.tie_weights()
            return model
        except UserError:
            raise
        except Exception as error:
            raise _unplannable(self.name, error) from error


def _unplannable(name: str, error: Exception) -> UserError:
    return UserError(f"the model {name} cannot be planned for: {first_line(error)}")


@contextmanager
def without_packing_search() -> Iterator[None]:
    """Without an attention mask transformers looks into the positions for packed sequences, and
    makes a whole mask where it cannot look, as under fake tensors; a real run makes none."""
    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        yield
        return
    stock = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = stock


@contextmanager
def converting_anew() -> Iterator[None]:
    """A part of a model that is made in a dtype of its own is converted as it is built; torch does
    that in place, which fake tensors do not allow."""

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        for key, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[key] = nn.Parameter(fn(parameter.data), parameter.requires_grad)
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = fn(buffer)
        return self

    module: Any = nn.Module
    stock = module._apply
    module._apply = apply
    try:
        yield
    finally:
        module._apply = stock


@contextmanager
def grouped_products() -> Iterator[None]:
    """The product of grouped experts has a rule for fake tensors in bf16 alone; in other dtypes
    the one that transformers falls back to stands for it, which makes the same tensors."""
    stock = getattr(moe, "_can_use_grouped_mm", None)
    if stock is None:
        yield
        return

    def can_use(input: Any, weight: Any, offs: Any) -> bool:
        plain = isinstance(weight, torch.Tensor) and weight.dtype != torch.bfloat16
        return not plain and bool(stock(input, weight, offs))

    moe._can_use_grouped_mm = can_use
    try:
        yield
    finally:
        moe._can_use_grouped_mm = stock
