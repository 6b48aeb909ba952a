"""`leanlift train --help`: every option that matters, in groups, with what it is without a word."""

from __future__ import annotations

import textwrap

from leanlift.cli.options import Option, defaults_of_mask, options
from leanlift.defaults import command_defaults
from leanlift.screen.terminal import WIDTH

NAMES = 30
"""Columns of the names."""

MORE = "More: the README, and docs/ beside it."

OWN_WORDS = {
    "max_length": "rows longer than so many tokens are cut",
    "packing": "put several rows into one of max_length tokens",
    "per_device_train_batch_size": "rows at a time",
    "gradient_accumulation_steps": "times that many rows make a step",
    "gradient_checkpointing": "compute activations again instead of keeping them",
    "activation_offloading": "keep activations in the CPU's memory",
    "num_train_epochs": "passes over the rows",
    "max_steps": "steps in all, instead of num_train_epochs; -1: that",
    "lr_scheduler_type": "how the learning rate falls: linear, cosine, constant, …",
    "max_grad_norm": "clip the gradient to this norm; 0: never",
    "eval_strategy": "when to evaluate: no, steps or epoch",
    "eval_steps": "with eval_strategy steps: every so many",
    "seed": "of the order of the rows and of dropout",
    "logging_steps": "a line every so many steps; below 1: a share of all",
    "save_strategy": "when to save a checkpoint: no, steps or epoch",
    "save_steps": "with save_strategy steps: every so many",
    "save_total_limit": "checkpoints that are kept; none: all",
    "resume_from_checkpoint": "true: go on from the last whole checkpoint; or a checkpoint's path",
}
"""For options whose help is another library's and long."""

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        "model_name_or_path", "model_revision", "load_in_4bit", "load_in_8bit",
        "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "dtype", "attn_implementation",
    ),
    "Data": (
        "dataset_name", "dataset_split", "eval_dataset_name", "eval_dataset_split", "max_length",
        "packing",
    ),
    "What is trained": (
        "density", "rank_budget", "approx_rank", "target_modules", "density_pattern", "selector",
        "calibration_rows", "block", "refresh_interval", "refresh_margin", "retired_limit",
        "selection_seed",
    ),
    "Memory": (
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
        "values_dtype", "optim", "optim_in_backward", "quantize_ends", "embedding_on_cpu",
        "activation_offloading", "selection_tile_mib", "ops", "snapshot", "use_cpu",
    ),
    "Training loop": (
        "learning_rate", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps",
        "max_grad_norm", "max_nonfinite_steps", "eval_strategy", "eval_steps", "seed", "bf16",
    ),
    "Output": (
        "output_dir", "merged_dir", "merge_onto", "logging_steps", "log_format", "report_to",
        "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint",
    ),
}  # fmt: skip

COMMAND = {
    "--config FILE": "a YAML file with any of these keys; flags override it",
    "--fit 8GB": "choose settings with which a card of this size will do",
    "--dry_run": "look at everything, plan the memory, and train nothing",
    "--help_all": "every other key of TRL's SFTConfig too",
}


def train_help(show_all: bool) -> str | None:
    """The text; None where the options cannot be read from their sources."""
    table = options()
    if table is None:
        return None
    lines = [
        "usage: leanlift train --config run.yaml [--key value ...]",
        "",
        "Fine-tune the principal weights of a model: the few per cent of each matrix",
        "that matter most. Every key may stand in the YAML file or be given as a flag.",
        "'leanlift init' writes such a file for your model, rows and card.",
        "",
    ]
    lines += [line for name, text in COMMAND.items() for line in _entry(name, text)]
    command = {name: str(value) for name, value in command_defaults({}).items()}
    mask = defaults_of_mask()
    groups = dict(GROUPS)
    if show_all:
        grouped = {name for names in GROUPS.values() for name in names}
        groups["Everything else (TRL's and transformers')"] = tuple(
            name for name in table if name not in grouped
        )
    for title, names in groups.items():
        lines += ["", title]
        for name in names:
            if name in table:
                lines += _entry(f"--{name}", _words(table[name], command, mask))
    return "\n".join([*lines, "", MORE])


def _words(option: Option, command: dict[str, str], mask: dict[str, str]) -> str:
    """Its help, and what it is where nothing is said."""
    text = OWN_WORDS.get(option.name, option.help).rstrip(".")
    if option.required:
        return f"{text} (required)"
    default = option.default or ""
    if option.name in command or default.startswith("LiftConfig."):
        default = command.get(option.name) or mask.get(option.name, "")
    if option.name == "target_modules":
        default = "all-linear"
    if "default" in text or default in ("none", "") or len(default) > 30:
        return text
    return f"{text} ({default.lower() if option.is_bool else default})"


def _entry(name: str, text: str) -> list[str]:
    """A name and its words, in columns; long names have a line of their own."""
    wrapped = textwrap.wrap(text, WIDTH - NAMES) or [""]
    if len(name) > NAMES - 4:
        return [f"  {name}", *(" " * NAMES + line for line in wrapped)]
    first = f"  {name}".ljust(NAMES) + wrapped[0]
    return [first.rstrip(), *(" " * NAMES + line for line in wrapped[1:])]
