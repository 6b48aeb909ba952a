"""What PEFT calls the base model of an adapter model: the model, and the verbs of its adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from leanlift.errors import UserError
from leanlift.lift_model.config import LiftPeftConfig
from leanlift.model import lift_state, unload_adapter
from leanlift.model.merged import drop_merged, hold_merged, merge_and_unload
from leanlift.model.several import adapter_names, delete_adapter, facts_of, set_adapter
from leanlift.model.state import every_layer


class LiftTuner(nn.Module):
    """Holds an attached model, which has all that there is to know in itself.

    Args:
        model: attached.

    Attributes:
        model: the same.
    """

    prefix = "lift_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._configs: dict[str, LiftPeftConfig] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # while a copy is made, which has none yet
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, LiftPeftConfig]:
        """The configurations of the adapters by name; the objects stay the same."""
        names = sorted(adapter_names(self.model))
        self._configs = {name: self._config(name) for name in names}
        return self._configs

    def _config(self, name: str) -> LiftPeftConfig:
        facts, known = facts_of(self.model, name), self._configs.get(name)
        if known is not None and known.lift is facts.config:
            return known
        return LiftPeftConfig.of(facts.config, facts.base.name, name == self.active_adapter)

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that the model computes with."""
        return lift_state(self.model).active

    @property
    def active_adapters(self) -> list[str]:
        """As PEFT has it; there is always one."""
        return [self.active_adapter]

    # --- on and off ------------------------------------------------------------------------

    def disable_adapter_layers(self) -> None:
        """Compute as the base, until `enable_adapter_layers`."""
        lift_state(self.model).workspace.off = True

    def enable_adapter_layers(self) -> None:
        """Compute with the adapter again."""
        lift_state(self.model).workspace.off = False

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        """Compute with another adapter, and train it unless `inference_mode`.

        Raises:
            UserError: more than one, or one that is not there.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) != 1:
            raise UserError(
                f"expected one adapter to compute with, got {names}: add_weighted_adapter makes "
                "one of several."
            )
        set_adapter(self.model, names[0])
        self.set_requires_grad(names[0], not inference_mode)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Let adapters be trained, or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            facts_of(self.model, name)
        for layer in every_layer(self.model).values():
            for name in names:
                slot = layer.worn if name == self.active_adapter else layer.shelf.get(name)
                if slot is not None and slot.index.count:
                    slot.values.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off, and free it."""
        delete_adapter(self.model, adapter_name)

    # --- merging ---------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Any = None, safe_merge: bool = False, dtype: Any = None
    ) -> None:
        """Keep the merged weights beside the base, so that no forward pass makes them; nothing is
        trained until `unmerge_adapter`. Takes as many bytes as the trained matrices in `dtype`."""
        self._only_active(adapter_names)
        hold_merged(self.model, dtype)

    def unmerge_adapter(self) -> None:
        """Free the merged weights. The model is to the bit what it was before."""
        drop_merged(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Any = None,
        dtype: Any = None,
    ) -> Any:
        """The stock model with the adapter merged into its weights, in `dtype`, or in that in which
        the base was loaded. A quantized base becomes as large as it was before."""
        self._only_active(adapter_names)
        return merge_and_unload(self.model, dtype, progressbar)

    def unload(self) -> Any:
        """The model without an adapter, still read by leanlift."""
        return unload_adapter(self.model)

    def _only_active(self, names: Any) -> None:
        if names is not None and list(names) != [self.active_adapter]:
            raise UserError(
                f"expected the adapter that the model computes with, {self.active_adapter!r}, got "
                f"{names}: set_adapter first, or make one of several with add_weighted_adapter."
            )
