"""The private parts of TRL and transformers that leanlift replaces are still what they were.

They are named in `leanlift/training/overrides.py` and `run_overrides.py` alone. Where one of these
tests fails, a release of theirs has changed it: see what the override must do now, then the table
here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer
import transformers.training_args
import trl.trainer.base_trainer
import trl.trainer.sft_trainer
from trl import SFTTrainer

import leanlift
from leanlift.training.overrides import TrainerOverrides
from leanlift.training.run_overrides import RunOverrides

SIGNATURES = {
    "_clip_grad_norm": "model",
    "_get_grad_norm": "model, grad_norm=None",
    "_get_output_dir": "trial",
    "_init_training_state": "max_steps, num_update_steps_per_epoch, num_train_epochs, "
    "resume_from_checkpoint, trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint, model=None",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_load_scaler": "checkpoint",
    "_prepare_dataset": "dataset, processing_class, args, packing, formatting_func, dataset_name",
    "_run_epoch": "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, "
    "trial, ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
    "steps_trained_in_current_epoch",
    "_save": "output_dir=None, state_dict=None",
    "_save_checkpoint": "model, trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "_save_scaler": "output_dir",
    "_send_telemetry": "",
}
"""Private methods that are overridden -> their parameters, without self and annotations."""

FIELDS = {
    "_metrics": trl.trainer.sft_trainer,
    "_total_train_tokens": trl.trainer.sft_trainer,
    "_name": trl.trainer.base_trainer,
    "_tag_names": trl.trainer.base_trainer,
    "_n_gpu": transformers.training_args,
}
"""Private fields that are read or set -> the module that uses them."""

LOOK = "look at leanlift/training/(run_)overrides.py, which was written for the former one"
UPSTREAM = (transformers.trainer, trl.trainer.base_trainer, trl.trainer.sft_trainer)


def parameters_of(function: Any) -> str:
    """Names and defaults of a method's parameters."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters
    )


def complaint(name: str, upstream: Any, source: str, expected: str) -> str | None:
    """What has become of a private method; None: it is as it was."""
    method = getattr(upstream, name, None)
    if method is None:
        return f"{upstream.__name__}.{name} is gone, so our override is never called: {LOOK}."
    found = parameters_of(method)
    if found != expected:
        return f"{upstream.__name__}.{name} takes ({found}), no longer ({expected}): {LOOK}."
    if not re.search(rf"\.{name}\(", source):
        return f"nobody calls {upstream.__name__}.{name} any more: {LOOK}."
    return None


@pytest.fixture(scope="module")
def source() -> str:
    return "".join(inspect.getsource(module) for module in UPSTREAM)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_private_method_is_still_what_we_override(name: str, source: str) -> None:
    said = complaint(name, SFTTrainer, source, SIGNATURES[name])
    assert said is None, said


@pytest.mark.parametrize("name", FIELDS)
def test_a_private_field_is_still_there(name: str) -> None:
    used = re.search(rf"\b{name}\b", inspect.getsource(FIELDS[name]))
    assert used, f"{FIELDS[name].__name__} has no {name} any more: {LOOK}."


def test_the_tables_are_whole() -> None:
    own = {
        name
        for kind in (TrainerOverrides, RunOverrides)
        for name, value in vars(kind).items()
        if name.startswith("_") and not name.startswith("__") and hasattr(SFTTrainer, name)
        if callable(value)
    }
    assert own == set(SIGNATURES)


class Changed:
    """A trainer of another release."""

    def _save(self, output_dir: str, state_dict: Any = None, safe: bool = True) -> None: ...

    def _load_rng_state(self, checkpoint: str) -> None: ...


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("_save", r"Changed\._save takes \(output_dir, state_dict=None, safe=True\), no longer "),
        ("_save_scaler", r"Changed\._save_scaler is gone, so our override is never called"),
        ("_load_rng_state", r"nobody calls Changed\._load_rng_state any more"),
    ],
)
def test_what_has_changed_is_said(name: str, said: str) -> None:
    found = complaint(name, Changed, "self._save(x)", SIGNATURES[name])
    assert found is not None
    assert re.match(said, found)
    assert found.endswith(f"{LOOK}.")


def private_of_theirs(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Private methods and fields of TRL's and Trainer's that a file names, and where."""
    names = {*SIGNATURES, *FIELDS} - {"_name", "_save"}  # which others may well have
    for node in ast.walk(tree):
        name = getattr(node, "attr", None) or getattr(node, "name", None)
        if name in names:
            yield name, node.lineno


def test_they_are_named_in_one_file() -> None:
    package = Path(leanlift.__file__).parent
    found = {
        path.relative_to(package).as_posix(): list(private_of_theirs(ast.parse(path.read_text())))
        for path in package.rglob("*.py")
    }
    named = sorted(path for path, places in found.items() if places)
    assert named == ["training/overrides.py", "training/run_overrides.py"]
