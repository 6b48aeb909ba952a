"""The changes of settings that make a run need less, cheapest first: each with what it costs, and
what it may save.

What is free comes first, then what costs time, last what costs quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.format import name_of, size
from leanlift.layers.tiled_mlp import LEAST
from leanlift.methods import SFT
from leanlift.plan import MemoryPlan
from leanlift.processes import processes
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.plan import can_be_tiled, is_tied

Settings = tuple[RunArguments, LiftSFTConfig]
LEAST_DENSITY = 0.01

LEFT = ("density", "per_device_train_batch_size", "per_device_eval_batch_size")
"""What is trained, and on how many rows at once: as it was asked for."""

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Names of one setting: the later one is transformers' since 5.24, and wins where both are set."""


@dataclass(frozen=True)
class Change:
    """One change of settings.

    Attributes:
        keys: the settings and their new values, as they stand in a file.
        cost: in words.
    """

    keys: dict[str, Any]
    cost: str

    def __call__(self, settings: Settings) -> Settings:
        args, sft = settings
        run = {key: value for key, value in self.keys.items() if hasattr(args, key)}
        loop = {key: value for key, value in self.keys.items() if key not in run}
        if "gradient_checkpointing" in loop:
            on = loop["gradient_checkpointing"]
            loop |= {name: on for name in CHECKPOINTING if hasattr(sft, name)}
        if loop and hasattr(sft, "steps_per_generation"):  # made of the other sizes, by TRL
            loop = {"steps_per_generation": None} | loop
        return replace(args, **run) if run else args, replace(sft, **loop) if loop else sft

    def possible(self, settings: Settings) -> bool:
        """Whether a run could be made with it: updates in the backward pass and 16-bit offsets take
        an optimizer of ours."""
        sft = settings[1]
        ours = name_of(sft.optim) in SPARSE_OPTIMIZERS
        if "stream_state" in self.keys:
            return settings[0].stream_base and ours
        return ours or not {"optim_in_backward", "values_dtype"} & self.keys.keys()

    @property
    def named(self) -> str:
        """The settings as flags are written."""
        return " and ".join(f"{key}={_text(value)}" for key, value in self.keys.items())

    def __str__(self) -> str:
        return f"{self.named}, {self.cost}"


@dataclass(frozen=True)
class Taken:
    """A change that was made: what was needed before, and after."""

    change: Change
    before: int
    after: int

    @property
    def saved(self) -> int:
        """Bytes of the peak that it takes away."""
        return self.before - self.after

    def __str__(self) -> str:
        return f"{self.change}: {size(self.after)} ({size(self.saved)} less)"


def changes(args: RunArguments, sft: LiftSFTConfig, cuda: bool = True) -> Iterator[Any]:
    """What to try against a peak, cheapest first, each on its own: (what and at what cost, how)."""
    for choices in ordered_changes(args, sft, cuda):
        if "per_device_eval_batch_size" not in choices[0].keys:
            for change in choices:
                if change.possible((args, sft)):
                    yield str(change), change


def ordered_changes(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool = True
) -> Iterator[tuple[Change, ...]]:
    """Changes against a peak, cheapest first; of one tuple only one is made, and each needs less
    than the one before. They are made one after the other, where they are possible by then. On a
    CPU (`cuda` False) nothing can be moved to one."""
    for offer in OFFERS:
        choices = tuple(offer(args, sft, cuda))
        if choices:
            yield choices


def further_changes(args: RunArguments, sft: LiftSFTConfig, cuda: bool = True) -> Iterator[Change]:
    """The changes but for those of `LEFT`, in the order in which `fit` makes them."""
    for choices in ordered_changes(args, sft, cuda):
        if not set(LEFT) & choices[0].keys.keys():
            yield choices[0]


# --- what there is to change ------------------------------------------------------------------


def _moments_in_8_bits(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    optim = name_of(sft.optim)
    if not sft.fp16 and SPARSE_OPTIMIZERS.get(optim) != "8bit":
        keys = {"optim": "sparse_adamw_8bit"}
        yield Change(keys, "moments in 8 bits instead of 32: no loss measured")


def _offsets_in_16_bits(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    """Beside an optimizer of ours, which every run has by then but one under fp16."""
    if args.values_dtype == "float32" and not sft.fp16:
        cost = "offsets in 16 bits, rounded stochastically: no loss measured"
        yield Change({"values_dtype": "bfloat16"}, cost)


def _smaller_evaluation(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if name_of(sft.eval_strategy) != "no":
        for rows in _halves(sft.per_device_eval_batch_size):
            keys = {"per_device_eval_batch_size": rows}
            yield Change(keys, "the same evaluation in smaller batches")


def _recomputing(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if not sft.gradient_checkpointing:
        yield Change({"gradient_checkpointing": True}, "costs a second forward pass")


def _all_recomputed(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if sft.kept_blocks:
        yield Change({"kept_blocks": 0}, "costs the rest of a second forward pass")


def _weights_made_twice(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if sft.reuse_weights:
        yield Change({"reuse_weights": False}, "weights are made once more")


def _mlps_in_pieces(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if not args.tiled_mlp and can_be_tiled(args, sft):
        cost = "MLPs in pieces: weights are made more often"
        yield Change({"tiled_mlp": True}, cost)


def _smaller_pieces(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if (args.mlp_tokens or 0) > LEAST:
        yield Change({"mlp_tokens": LEAST}, "weights are made more often")


def _smaller_micro_batch(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    """The same batch in more pieces."""
    rows, times = sft.per_device_train_batch_size, sft.gradient_accumulation_steps
    for fewer in _halves(rows):
        keys = {
            "per_device_train_batch_size": fewer,
            "gradient_accumulation_steps": times * rows // fewer,
        }
        yield Change(keys, "the same batch in more pieces: a little time")


def _embeddings_in_int8(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if args.method != SFT:  # TRL's trainers multiply with a dense head themselves
        return
    if not args.quantize_embeddings and not args.modules_to_save:
        cost = "embedding and head in INT8 while training: a little rounding"
        yield Change({"quantize_embeddings": True}, cost)


def _embedding_on_cpu(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    here = args.embedding_on_cpu or args.trainable_token_indices
    if cuda and not here and not is_tied(args, sft):
        yield Change({"embedding_on_cpu": True}, "rows are looked up on the CPU: a little time")


def _activations_on_cpu(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if cuda and not getattr(sft, "activation_offloading", True):
        yield Change({"activation_offloading": True}, "costs transfers to the CPU")


def _blocks_on_the_host(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if cuda and not args.stream_base and processes() == 1:
        cost = "blocks come from the CPU's memory: time, for short rows"
        yield Change({"stream_base": True}, cost)


def _updates_in_backward(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if not sft.optim_in_backward and not sft.fp16:
        keys = {"optim_in_backward": True, "max_grad_norm": 0.0}
        yield Change(keys, "gives up gradient clipping")


def _state_on_the_host(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if cuda and not args.stream_state and not sft.fp16 and processes() == 1:
        keys = {"stream_state": True, "optim_in_backward": True, "max_grad_norm": 0.0}
        cost = "what is learned comes along with the blocks: time"
        yield Change(keys, cost if sft.optim_in_backward else f"{cost}, and no gradient clipping")


def _fewer_entries(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> Iterator[Change]:
    if args.rank_budget is None and args.density > LEAST_DENSITY:
        for density in densities(args.density):
            yield Change({"density": density}, "fewer trained entries: this costs quality")


Offer = Callable[[RunArguments, LiftSFTConfig, bool], Iterator[Change]]
OFFERS: tuple[Offer, ...] = (
    _moments_in_8_bits,
    _offsets_in_16_bits,
    _smaller_evaluation,
    _recomputing,
    _weights_made_twice,
    _all_recomputed,
    _mlps_in_pieces,
    _smaller_pieces,
    _smaller_micro_batch,
    _embeddings_in_int8,
    _embedding_on_cpu,
    _activations_on_cpu,
    _blocks_on_the_host,
    _updates_in_backward,
    _state_on_the_host,
    _fewer_entries,
)
"""In the order in which they are made. Each gives the sizes of one change, or nothing where there
is none to make."""


def shorter_rows(sft: LiftSFTConfig) -> Iterator[Change]:
    """Half of `max_length`, which is never changed unasked: rows are cut."""
    if (getattr(sft, "max_length", None) or 0) > 512:
        yield Change(
            {"max_length": (getattr(sft, "max_length", None) or 0) // 2},
            "rows that are longer are cut",
        )


# --- what a change may save -------------------------------------------------------------------


def at_most(change: Change, plan: MemoryPlan) -> float:
    """What a change may save, from the bytes that it is about: which ones are worth a plan."""
    held, entries = plan.categories, ("index", "values", "gradients", "optimizer state")
    activations = held["activations and workspace"]
    return {
        "density": sum(held[name] for name in entries) / 2,
        "quantize_embeddings": held["embeddings and head"] / 2,
        "embedding_on_cpu": held["embeddings and head"] / 2,
        "optim": 0.75 * held["optimizer state"],
        "values_dtype": (held["values"] + held["gradients"]) / 2,
        "optim_in_backward": held["gradients"],
        "gradient_checkpointing": activations,
        "kept_blocks": activations,
        "reuse_weights": activations,
        "activation_offloading": activations / 2,
        "stream_base": held["base weights"],
        "stream_state": held["index"] + held["values"] + held["optimizer state"],
        "tiled_mlp": activations / 2 if plan.holds_for["max_length"] > LEAST else 0,
        "mlp_tokens": activations / 2,
        "per_device_train_batch_size": activations,
        "max_length": activations / 2,
        "per_device_eval_batch_size": plan.peak - plan.phases["train"],
    }[next(iter(change.keys))]


# --- values -----------------------------------------------------------------------------------


def _halves(number: int) -> list[int]:
    found = []
    while number > 1:
        number = number // 2 if number % 2 == 0 else 1
        found.append(number)
    return found


def densities(density: float) -> list[float]:
    """Smaller densities down to the least, in ten steps."""
    steps = 10
    found = [density - (density - LEAST_DENSITY) * i / steps for i in range(1, steps)]
    rounded = [float(f"{value:.2g}") for value in found]
    return [*(d for d in dict.fromkeys(rounded) if LEAST_DENSITY < d < density), LEAST_DENSITY]


def half_of(choices: tuple[Change, ...], args: RunArguments) -> Change:
    """The most that choices offer; of densities half of what there is."""
    last = choices[-1]
    if "density" not in last.keys:
        return last
    return replace(last, keys={"density": max(LEAST_DENSITY, args.density / 2)})


def _text(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
