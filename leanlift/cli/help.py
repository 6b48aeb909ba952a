"""`leanlift train --help`: every option that matters, in groups, with what it is without a word."""

from __future__ import annotations

import textwrap

from leanlift.cli.options import Option, options
from leanlift.defaults import command_defaults
from leanlift.format.terminal import WIDTH
from leanlift.methods import SFT

NAMES = 33
"""Columns of the names."""

MORE = "More: the README, and docs/ beside it."

OWN_WORDS = {
    "max_length": "rows of more tokens are cut",
    "packing": "several rows in one of max_length tokens",
    "per_device_train_batch_size": "rows at a time",
    "gradient_accumulation_steps": "so often before a step",
    "gradient_checkpointing": "compute activations again instead of keeping them",
    "activation_offloading": "activations wait in the CPU's memory",
    "num_train_epochs": "passes over the rows",
    "max_steps": "instead of num_train_epochs; -1: that",
    "lr_scheduler_type": "or cosine, constant, …",
    "max_grad_norm": "clip the gradient; 0: never",
    "eval_strategy": "or steps, epoch",
    "eval_steps": "with eval_strategy steps",
    "seed": "of the rows' order",
    "logging_steps": "a line every so many steps",
    "save_strategy": "or no, epoch",
    "save_steps": "with save_strategy steps",
    "save_total_limit": "checkpoints that are kept; none: all",
    "loss_type": "of TRL's trainer; what there is says --help_all",
    "beta": "how near the policy stays to its reference",
    "num_generations": "completions of a prompt that are compared",
    "max_completion_length": "tokens that are generated at most",
    "temperature": "of what is generated",
    "resume_from_checkpoint": "true: the last whole one; or a path",
}
"""A line for each option of the groups that TRL or transformers declare; --help_all has their own
words."""

PLAN_USAGE = """usage: leanlift plan --model_name_or_path M [--key value ...] [--fit 8GB]
                     [--save run.yaml] [--cpu] [--json] [--plot FILE]

What fine-tuning M will need, from its config.json alone: a hub name, a
directory, or the file. Takes the keys of 'leanlift train' (see its --help):
  --max_length 2048 --density 0.05 --quantize_embeddings true

  --fit 8GB     choose settings with which a card of this size will do, and
                say why
  --save FILE   write the settings, with reasons, for 'leanlift train
                --config FILE'
  --max_length max
                the longest rows that cards have room for, or that of --fit
  --table       what settings need and how long a step of theirs takes, by
                card: as they are, with each change more, and chosen by --fit
  --card NAME   say how long a step takes there, modelled: rtx4090, a100, …;
                else on this machine's card, or on one of the size of --fit
  --cpu         plan for a run on the CPU
  --json        print JSON (docs/plan.md)
  --plot FILE   also draw the bytes as a stacked bar (needs matplotlib)
"""

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        "model_name_or_path", "model_revision", "load_in_4bit", "load_in_8bit",
        "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "dtype", "attn_implementation",
    ),
    "Data": (
        "dataset_name", "dataset_split", "datasets", "streaming", "formatting_func",
        "eval_dataset_name", "eval_dataset_split", "keep_dataset_name", "max_length", "packing",
    ),
    "Method": (
        "method", "reward_funcs", "beta", "loss_type", "num_generations", "max_completion_length",
        "temperature", "epsilon", "cpo_alpha", "simpo_gamma", "desirable_weight",
        "undesirable_weight",
    ),
    "What is trained": (
        "density", "rank_budget", "approx_rank", "target_modules", "exclude_modules",
        "modules_to_save", "trainable_token_indices",
        "density_pattern", "selector", "calibration_rows", "block", "refresh_interval",
        "refresh_margin", "retired_limit", "selection_seed",
    ),
    "Memory": (
        "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing",
        "kept_blocks", "values_dtype", "optim", "optim_in_backward", "quantize_embeddings",
        "embedding_on_cpu", "stream_base", "stream_state", "tiled_mlp", "activation_offloading",
        "ops", "snapshot", "use_cpu",
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
    "--help_all": "every key there is, and more about each",
}


def train_help(show_all: bool, method: str = SFT) -> str | None:
    """The text; None where the options cannot be read from their sources."""
    table = options(method)
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
                value = "VALUES" if table[name].kind.many else "VALUE"
                lines += _entry(f"--{name} {value}", _words(table[name], command, not show_all))
    return "\n".join([*lines, "", MORE])


def _words(option: Option, command: dict[str, str], short: bool) -> str:
    """Its help, and what it is where nothing is said."""
    text = (OWN_WORDS.get(option.name) or option.brief) if short else ""
    text = text or option.help.rstrip(".")
    if option.required:
        return f"{text} (required)"
    default = command.get(option.name) or option.default or ""
    if "default" in text or default in ("none", "") or len(default) > 30:
        return text
    return f"{text} ({default.lower() if option.kind.switch else default})"


def _entry(name: str, text: str) -> list[str]:
    """A name and its words, in columns; long names have a line of their own."""
    wrapped = textwrap.wrap(text, WIDTH - NAMES) or [""]
    if len(name) > NAMES - 4:
        return [f"  {name}", *(" " * NAMES + line for line in wrapped)]
    first = f"  {name}".ljust(NAMES) + wrapped[0]
    return [first.rstrip(), *(" " * NAMES + line for line in wrapped[1:])]
