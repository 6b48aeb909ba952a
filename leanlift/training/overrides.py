"""What leanlift replaces of TRL's SFTTrainer that is not its to promise; see `run_overrides`."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from leanlift.data.ready import drop_untrained_packs
from leanlift.processes import of_all, processes
from leanlift.rows.examples import columns_of
from leanlift.training.lift_run import LiftRun


class TrainerOverrides(LiftRun, SFTTrainer):
    """An `SFTTrainer` with the private methods that `LiftTrainer` needs otherwise."""

    _tag_names = ["leanlift", "sft"]  # noqa: RUF012
    _name = "leanlift"

    # --- data ------------------------------------------------------------------------------

    def ready_rows(self, rows: Any, name: str, packing: bool) -> Any:
        """Tokenized rows of a dataset that is given after construction."""
        return rows

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """Packing and shuffling are TRL's; rows given to `evaluate` are tokenized first."""
        dataset = self.ready_rows(dataset, dataset_name, packing)
        packing = packing and "seq_lengths" not in columns_of(dataset)  # packed already
        made = super()._prepare_dataset(
            dataset, processing_class, args, packing, None, dataset_name
        )
        return drop_untrained_packs(made, dataset_name) if packing else made

    # --- what is logged --------------------------------------------------------------------

    def logged(self, mode: str) -> dict[str, list[Any]]:
        """What TRL averages into its next log of "train" or "eval", by name."""
        metrics: dict[str, list[Any]] = self._metrics[mode]
        return metrics

    def count_tokens(self, inputs: Any) -> Any:
        """Count the tokens of a batch of training; all so far."""
        mask = inputs.get("attention_mask")
        self._total_train_tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
        return self._total_train_tokens

    @property
    def tokens_so_far(self) -> Any:
        """Tokens of all batches of training."""
        return self._total_train_tokens

    def read_metrics(self) -> None:
        """Read from the device what is to be logged: here, not at each step."""
        for metrics in self._metrics.values():
            for name, values in metrics.items():
                metrics[name] = [float(value) for value in values]
        if processes() > 1:
            logged = of_all({mode: dict(each) for mode, each in self._metrics.items()})
            for mode, metrics in self._metrics.items():
                for name in metrics:
                    metrics[name] = together(name, [each[mode].get(name, []) for each in logged])

    # --- the loss --------------------------------------------------------------------------

    def count_next_tokens(self) -> None:
        """Have the loss divided by the trained tokens of the whole accumulated batch, whatever the
        model's own loss does: ours takes their number, and shifts labels."""
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True


def together(name: str, values: list[list[float]]) -> list[float]:
    """What several processes log of a batch each: of a count the sum, of a mean the mean."""
    if name == "num_tokens":
        return [sum(each[-1] for each in values if each)]
    return [value for each in values for value in each]
