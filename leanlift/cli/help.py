"""`leanlift train --help`: every option that matters, in groups, with what it is without a word."""

from __future__ import annotations

import textwrap

from leanlift.cli.options import Option, defaults_of_mask, options
from leanlift.defaults import command_defaults
from leanlift.format.terminal import WIDTH

NAMES = 33
"""Columns of the names."""

MORE = "More: the README, and docs/ beside it."

OWN_WORDS = {
    "model_name_or_path": "the base: a directory or a hub name",
    "model_revision": "branch, tag or commit of a base on the hub",
    "bnb_4bit_use_double_quant": "quantize scales too",
    "dtype": "of the rest; default bfloat16, on a CPU float32",
    "attn_implementation": "e.g. sdpa or flash_attention_2",
    "dataset_name": "a .json, .jsonl or .parquet file, or a hub name",
    "dataset_split": "of a hub dataset, or train[:100] of a file",
    "eval_dataset_split": "of a hub dataset",
    "max_length": "rows of more tokens are cut",
    "packing": "several rows in one of max_length tokens",
    "density": "share of each matrix that is trained",
    "rank_budget": "r·(m+n) entries a matrix, as a rank-r LoRA has",
    "approx_rank": "rank of the approximation that ranks entries",
    "target_modules": "or attention, mlp, q_proj v_proj …",
    "density_pattern": """own densities: '{"down_proj": 0.1}'""",
    "selector": "or magnitude, random, gradient",
    "calibration_rows": "rows that selector=gradient looks at",
    "block": "b: take b x b blocks whole",
    "refresh_interval": "choose anew every so many steps; 0: never",
    "refresh_margin": "by how much a newcomer must be larger",
    "retired_limit": "entries let go, per trained one; below 0: any",
    "selection_seed": "of the selection",
    "per_device_train_batch_size": "rows at a time",
    "gradient_accumulation_steps": "so often before a step",
    "gradient_checkpointing": "compute activations again instead of keeping them",
    "values_dtype": "of the trained offsets",
    "optim": "or sparse_adamw, adamw_torch, adamw_8bit, …",
    "optim_in_backward": "update each matrix at once; max_grad_norm 0",
    "quantize_embeddings": "embedding and output head in INT8",
    "embedding_on_cpu": "not where it is tied to the head",
    "activation_offloading": "activations wait in the CPU's memory",
    "ops": "triton, torch, or auto",
    "snapshot": "keep torch's memory timeline, on CUDA",
    "use_cpu": "also beside a GPU",
    "num_train_epochs": "passes over the rows",
    "max_steps": "instead of num_train_epochs; -1: that",
    "lr_scheduler_type": "or cosine, constant, …",
    "warmup_steps": "below 1: a share of all steps",
    "max_grad_norm": "clip the gradient; 0: never",
    "max_nonfinite_steps": "bad steps in a row that end a run",
    "eval_strategy": "or steps, epoch",
    "eval_steps": "with eval_strategy steps",
    "seed": "of the rows' order",
    "bf16": "bf16 autocast; default: on a GPU",
    "output_dir": "adapter, checkpoints and reports",
    "merged_dir": "also write the merged fp16 checkpoint there",
    "merge_onto": "or quantized: exactly what was trained",
    "logging_steps": "a line every so many steps",
    "log_format": "or rich, plain, json",
    "report_to": "e.g. tensorboard or wandb",
    "save_strategy": "or no, epoch",
    "save_steps": "with save_strategy steps",
    "save_total_limit": "checkpoints that are kept; none: all",
    "resume_from_checkpoint": "true: the last whole one; or a path",
}
"""A line for each of the groups' options; --help_all has their own words."""

PLAN_USAGE = """usage: leanlift plan --model_name_or_path M [--key value ...] [--fit 8GB]
                     [--save run.yaml] [--cpu] [--json] [--plot FILE]

What fine-tuning M will need, from its config.json alone: a hub name, a
directory, or the file. Takes the keys of 'leanlift train' (see its --help):
  --max_length 2048 --density 0.05 --quantize_embeddings true

  --fit 8GB     choose settings with which a card of this size will do, and
                say why
  --save FILE   write the settings, with reasons, for 'leanlift train
                --config FILE'
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
        "values_dtype", "optim", "optim_in_backward", "quantize_embeddings", "embedding_on_cpu",
        "activation_offloading", "ops", "snapshot", "use_cpu",
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
                value = "VALUES" if table[name].takes_many else "VALUE"
                lines += _entry(
                    f"--{name} {value}", _words(table[name], command, mask, not show_all)
                )
    return "\n".join([*lines, "", MORE])


def _words(option: Option, command: dict[str, str], mask: dict[str, str], short: bool) -> str:
    """Its help, and what it is where nothing is said."""
    text = (OWN_WORDS.get(option.name, "") if short else "") or option.help.rstrip(".")
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
