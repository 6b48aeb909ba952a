"""`LiftModel`: an attached model as an adapter model of PEFT's.

Trainers ask whether a model is a `PeftModel`, and if it is, let its own methods save it, load it
and turn its adapter off: so no second base is loaded as a reference, and a checkpoint has the
adapter alone. That is all that is taken from PEFT. What there is to know is in the model inside;
this class holds nothing, so that any number of them may be made around one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel
from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.io.hub import push_to_hub
from leanlift.lift_model.config import PEFT_TYPE, LiftPeftConfig
from leanlift.lift_model.tuner import LiftTuner
from leanlift.model import lift_state, lifted, load_adapter, save_adapter, several, weights_of
from leanlift.model.state import DEFAULT


class LiftModel(PeftModel):
    """An adapter model in PEFT's sense around an attached model; see `get_lift_model`.

    Its methods are PEFT's, and mean what they mean there. One adapter computes at a time; several
    share the base (`load_adapter`, `add_adapter`, `set_adapter`, `add_weighted_adapter`).

    Args:
        model: attached, or a `LiftModel`.

    Raises:
        UserError: nothing is attached.
    """

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)  # PeftModel's own would make a layer of PEFT's
        lift_state(model)
        self.base_model = LiftTuner(lifted(model))
        self.peft_type = PEFT_TYPE
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._peft_config = None
        self.train(lifted(model).training)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        progress: bool = False,
        **kwargs: Any,
    ) -> LiftModel:
        """Load an adapter onto a stock model, or beside the adapters of one that has some.

        Args:
            model: the adapter's base.
            model_id: a directory or hub name.
            adapter_name: by which it is known then.
            is_trainable: whether its offsets are trained; else they are frozen.
            progress: whether to show a bar over the matrices.

        Raises:
            UserError: as for `load_adapter`, or an argument that leanlift does not know.
        """
        _no_more(kwargs, "LiftModel.from_pretrained")
        inner = lifted(model)
        if hasattr(inner, "leanlift"):
            several.load_beside(inner, model_id, adapter_name, progress)
            several.set_adapter(inner, adapter_name)
        else:
            load_adapter(inner, model_id, progress)
            lift_state(inner).active = adapter_name
        made = cls(inner)
        made.base_model.set_requires_grad(adapter_name, is_trainable)
        return made if is_trainable else made.eval()

    # --- what PEFT's own __init__ would have set -------------------------------------------

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that the model computes with."""
        return self.base_model.active_adapter

    @property
    def _adapters_disabled(self) -> bool:
        return lift_state(self).workspace.is_off

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel need not send to all processes when it begins, for each has
        loaded it: all that is frozen."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        names = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
        return [name for name in names if name not in trained]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of what is trained whole."""
        return set(lift_state(self).config.modules_to_save) or None

    # --- saving and loading ----------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the adapter; with several, each but "default" into a directory of its name. Copies
        in which nothing is learned, as references of trainers are, are left out.

        Args:
            save_directory: where to.
            safe_serialization: True; there is no other form.
            selected_adapters: which; None: all.
            is_main_process: False writes nothing: one process writes for all.
            push_to_hub: False; `leanlift.push_to_hub` does that.
            kwargs: what others hand over beside, such as `state_dict`, is not needed.

        Raises:
            UserError: as for `save_adapter`, or another form is asked for.
        """
        if not safe_serialization:
            raise UserError("adapters are written as safetensors alone, and never pickled.")
        if push_to_hub:
            raise UserError("save first, and push the directory with leanlift.push_to_hub.")
        names = selected_adapters
        if names is None:
            names = several.learned_names(self) or [self.active_adapter]
        several.check_saved(self, names)
        if not is_main_process:
            return
        before = self.active_adapter
        try:
            for name in names:
                several.set_adapter(self, name)
                save_adapter(self, Path(save_directory) / ("" if name == DEFAULT else name))
        finally:
            several.set_adapter(self, before)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = False,
        commit_message: str = "Upload with leanlift",
        **kwargs: Any,
    ) -> str:
        """Upload the adapter; returns the address of the commit.

        Args:
            repo_id: "user/name"; made if it does not exist.
            private: whether it is made as a private one.
            commit_message: of the commit.

        Raises:
            UserError: as for `leanlift.push_to_hub`, or an argument that leanlift does not know.
        """
        _no_more(kwargs, "push_to_hub")
        with TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return push_to_hub(directory, repo_id, private, commit_message)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        progress: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter under a name: beside the others, or in the place of the one that has the
        name. Which one computes stays as it is; Parameters of as many entries stay.

        Raises:
            UserError: as for `leanlift.load_adapter`, or it differs from the others in what all
                share.
        """
        known = adapter_name in self.peft_config
        several.load_beside(self, model_id, adapter_name, progress)
        if not known:
            self.base_model.set_requires_grad(adapter_name, is_trainable)

    def add_adapter(
        self, adapter_name: str, peft_config: LiftConfig | LiftPeftConfig, **kwargs: Any
    ) -> None:
        """Select positions for one more adapter. With the configuration object of an adapter that
        is there (`model.peft_config[name]`) the new one is a frozen copy of that, as a reference
        to train against: it shares positions, and takes no memory where nothing is learned yet.

        Raises:
            UserError: another kind of configuration, or as for `get_lift_model`.
        """
        for name, config in self.peft_config.items():
            if isinstance(peft_config, LiftPeftConfig) and config.lift is peft_config.lift:
                several.copy_adapter(self, name, adapter_name)
                return
        config = peft_config.lift if isinstance(peft_config, LiftPeftConfig) else peft_config
        if not isinstance(config, LiftConfig):
            raise UserError(
                f"expected a LiftConfig for adapter {adapter_name!r}, got a "
                f"{type(peft_config).__name__}: layers of another kind do not go onto this model."
            )
        several.add_adapter(self, adapter_name, config)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Make one more adapter, the weighted sum of some that are there.

        Raises:
            UserError: another combination than "linear", or as for `several.add_weighted_adapter`.
        """
        if combination_type != "linear":
            raise UserError(
                f'expected combination_type="linear", got {combination_type!r:.40}: offsets at '
                "positions are added up."
            )
        several.add_weighted_adapter(self, adapters, weights, adapter_name)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Compute with another adapter, and train it unless `inference_mode`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off, and free it; the last one stays."""
        several.delete_adapter(self, adapter_name)

    # --- computing -------------------------------------------------------------------------

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute, in this thread, exactly as the frozen base; a head that the base has not stays.
        May be nested. What is computed here is gone back through as it was computed; but not under
        activation checkpointing, which computes again: compute without gradients then."""
        with lift_state(self).workspace.without_offsets():
            yield

    def forward(
        self, *args: Any, computes: Callable[[Any], Any] | None = None, **kwargs: Any
    ) -> Any:
        """The model's; or what `computes` makes of the model inside, for a loss that is computed
        in the forward pass of whatever is around this one, as DistributedDataParallel is."""
        if computes is not None:
            return computes(self.get_base_model())
        return self.get_base_model()(*args, **self._without_peft(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.get_base_model().generate(*args, **self._without_peft(kwargs))

    def enable_input_require_grads(self) -> None:
        """Nothing: transformers does it where it enables checkpointing, and what is done twice
        cannot be taken back (`LiftCallback` takes it back where nothing needs it)."""

    def _without_peft(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in kwargs.items() if k not in self.special_peft_forward_args}

    # --- what is told of it ----------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trained entries, and weights in all; those of a quantized matrix counted one by one."""
        return weights_of(self)

    def get_layer_status(self) -> Any:
        """Refused: it is about layers of PEFT's."""
        raise UserError("get_layer_status tells of PEFT's own layers; see model.peft_config.")

    def get_model_status(self) -> Any:
        """Refused: it is about layers of PEFT's."""
        raise UserError("get_model_status tells of PEFT's own layers; see model.peft_config.")

    def create_or_update_model_card(self, output_dir: str) -> None:
        """None: a card describes a finished model (`leanlift export`)."""


def _no_more(kwargs: dict[str, Any], what: str) -> None:
    if kwargs:
        raise UserError(f"{what} does not know {', '.join(kwargs)}: leave it out.")
