"""The settings of a run, kept in its checkpoints and compared when it goes on.

A checkpoint brings moments, a schedule's place and a mask with it. Under other settings they mean
something else: the mask is the old one, the learning rate the saved one, and with another batch
size the data begin at another row. So every key of the loop, the mask, the run and the data is
compared. What changes no step may change, and is said; everything else is refused by name, before
anything is loaded. Data are compared by what is in them, so files may move.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset
from transformers import TrainingArguments

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.settings import todays_names

Settings = dict[str, dict[str, Any]]
"""Section ("loop", "mask", "run" or "data") -> key -> JSON-ready value."""

_WRITTEN = """
output_dir logging_strategy logging_steps logging_first_step log_level log_level_replica
log_on_each_node include_num_input_tokens_seen disable_tqdm report_to run_name project
trackio_space_id trackio_bucket_id trackio_static_space_id save_strategy save_steps save_total_limit
save_only_model save_on_each_node enable_jit_checkpoint snapshot merged_dir merge_onto
log_format
"""
_EVALUATED = """
eval_strategy eval_steps eval_delay eval_accumulation_steps eval_packing
eval_do_concat_batches eval_use_gather_object per_device_eval_batch_size prediction_loss_only
include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval load_best_model_at_end
metric_for_best_model greater_is_better eval_dataset_name eval_dataset_split keep_dataset_name
"""
_COMPUTED_OTHERWISE = """
use_cpu ops attn_implementation embedding_on_cpu stream_base stream_state selection_tile_mib
optim_in_backward gradient_checkpointing activation_checkpointing kept_blocks tiled_mlp
fused_elementwise mlp_tokens reuse_weights activation_offloading torch_empty_cache_steps tf32
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataset_num_proc
"""
_MOVED = """
model_name_or_path dataset_name dataset_split datasets formatting_func
"""  # seen by fingerprint and digest instead
_OF_THE_PROCESS = """
restore_callback_states_from_checkpoint debug skip_memory_metrics max_nonfinite_steps
trust_remote_code
"""
FREE = frozenset(
    f"{_WRITTEN} {_EVALUATED} {_COMPUTED_OTHERWISE} {_MOVED} {_OF_THE_PROCESS}".split()
)
"""Keys that may change when a run goes on."""

NOT_KEPT = (
    "hub_", "push_to_hub", "resume_from_checkpoint", "local_rank", "do_", "ddp_",
    "eval_on_start", "logging_nan_inf_filter", "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs", "liger_kernel_config", "remove_unused_columns",
)  # fmt: skip
"""Beginnings of keys that are nobody's business, have no effect, or are changed by TRL or a run
itself."""

OF_THE_ORDER = ("split_batches", "even_batches", "use_seedable_sampler")
"""What of accelerate's settings decides which rows come when; others are changed while a trainer is
built."""

CONSTANT = ("constant", "constant_with_warmup")
"""Schedules that do not depend on the number of steps."""


def settings_of(
    args: TrainingArguments,
    lift: LiftConfig,
    run: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Settings:
    """All settings of a run as JSON gives them back.

    Args:
        args: of the loop.
        lift: the mask's.
        run: more keys, those of a command line; keys of `LiftConfig` among them are left out.
        data: what identifies the data.
    """
    mask = lift.to_dict()
    loop = {k: v for k, v in args.to_dict().items() if not k.startswith(NOT_KEPT)}
    if isinstance(loop.get("accelerator_config"), dict):
        held = loop["accelerator_config"]
        loop["accelerator_config"] = {key: held[key] for key in OF_THE_ORDER if key in held}
    sections = {
        "loop": loop,
        "mask": mask,
        "run": {key: value for key, value in (run or {}).items() if key not in mask},
        "data": dict(data or {}),
    }
    kept: Settings = json.loads(json.dumps(sections, default=str))
    return kept


def check_same_settings(saved: Any, now: Settings, where: str) -> list[str]:
    """Refuse changes that may not be.

    Former names of ours are read as today's; another key that only one side has is passed over:
    another version of a library has other keys.

    Args:
        saved: the settings of the checkpoint.
        now: those of this run.
        where: the checkpoint, for messages.

    Returns:
        The changes that may be, a sentence each.

    Raises:
        UserError: settings that are none, or a change that would not take effect or would change
            what the checkpoint's state means.
    """
    if not isinstance(saved, dict) or not all(isinstance(keys, dict) for keys in saved.values()):
        raise UserError(f"{where} is damaged: its settings are no mapping.")
    saved = {section: todays_names(keys, where) for section, keys in saved.items()}
    changes = [
        (key, saved[section][key], value)
        for section, keys in now.items()
        for key, value in keys.items()
        if key in saved.get(section, {}) and saved[section][key] != value
    ]
    free = _may_change(saved.get("loop", {}), now.get("loop", {}))
    refused = [change for change in changes if change[0] not in free]
    if refused:
        raise UserError(
            f"{where} was made with {_and(f'{k}={_short(old)}' for k, old, _ in refused)}, and "
            f"this run asks for {_and(f'{k}={_short(new)}' for k, _, new in refused)}: go on with "
            "the settings it was made with, or start a new run."
        )
    return [f"Going on with {k}={_short(new)}; it was {_short(old)}." for k, old, new in changes]


def _may_change(saved: dict[str, Any], now: dict[str, Any]) -> frozenset[str]:
    """Also the length, under a schedule that does not depend on it."""
    warmup = now.get("warmup_steps") or 0
    constant = now.get("lr_scheduler_type") == CONSTANT[0] or (
        now.get("lr_scheduler_type") == CONSTANT[1] and (warmup >= 1 or warmup == 0)
    )
    if constant and not now.get("warmup_ratio"):
        return FREE | {"max_steps", "num_train_epochs"}
    by_steps = (saved.get("max_steps") or 0) > 0 and (now.get("max_steps") or 0) > 0
    return FREE | {"num_train_epochs"} if by_steps else FREE


# --- data ----------------------------------------------------------------------------------


def data_facts(dataset: Any, prefix: str = "data_") -> dict[str, Any]:
    """The number of rows and a digest of their content; nothing of a stream.

    Args:
        dataset: rows, prepared or not.
        prefix: of the keys.
    """
    if not isinstance(dataset, Dataset):
        return {}
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        digest.update(name.encode())
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for name in sorted(table.column_names):
            digest.update(_column_bytes(table.column(name)))
    return {f"{prefix}rows": len(dataset), f"{prefix}digest": digest.hexdigest()[:16]}


def _column_bytes(column: pa.ChunkedArray) -> bytes:
    """The content of a column, whatever its chunks: lists of whole numbers without a detour
    through Python's objects, anything else as JSON."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and pa.types.is_integer(kind.value_type) and not column.null_count:
        flat = pc.list_flatten(column)
        if not flat.null_count:
            lengths = pc.list_value_length(column).to_numpy().astype("<i8")
            content: bytes = lengths.tobytes() + flat.to_numpy().astype("<i8").tobytes()
            return content
    return json.dumps(column.to_pylist(), sort_keys=True, default=str).encode()


def _and(parts: Any) -> str:
    return " and ".join(parts)


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, (int, float)) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def run_settings(args: Any, rows: Any) -> dict[str, Any]:
    """The settings of a command line and of the rows it names, known before anything is loaded.

    Args:
        args: a dataclass, as `RunArguments`.
        rows: the training rows.
    """
    return {**dataclasses.asdict(args), **data_facts(rows, "dataset_")}
