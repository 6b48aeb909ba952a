"""What a directory or file is that someone has named, told at a glance from the names in it.

A base is wanted and an adapter comes, an adapter is wanted and a LoRA or a GGUF file comes: what
is said should name what came. Nothing but a few names and one small JSON file is read.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.files import read_json

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FACTS_NAME = "leanlift.json"
RUN_NAME = "run.json"
STATE_NAME = "trainer_state.json"
PREDICTIONS_NAME = "predictions.jsonl"
"""Answers to rows, as `leanlift eval --predictions` writes them."""

ADAPTER_FORMATS = (1, 2, 3, 4, 5)
"""Of adapters that are read. 1 has no samples of the base, no revision and no special tokens. 3 has
an embedding with more rows than the base's, which a reader of 2 would not give it; 4 has a base
whose tensors are not under the model's names, where a reader of 3 would not find them."""

RETIRED = ".settled"
"""After a target's name: where its retired entries are, by the word of the first format."""

OWN_TYPE = "LEANLIFT"
PEFT_TYPES = {"SHIRA": "SHiRA", "SUPERTUNING": "Super-Tuning"}
"""The forms of PEFT's that are read, by its names, and what they are called in a sentence."""

WRITTEN_TYPE = (
    f"{OWN_TYPE}: no adapter of PEFT's; load it with leanlift.load_adapter(model, directory), or "
    "merge it with leanlift export"
)
"""What an adapter_config.json of ours has as its `peft_type`. Stock PEFT, and with it
`AutoModel.from_pretrained`, ends in a KeyError of these words: the only place where a reader of
PEFT's can be told what to call. `OWN_TYPE` alone, which was written before, is read too."""


@dataclass(frozen=True)
class Place:
    """What was found.

    Attributes:
        kind: "adapter" (one that leanlift reads), "foreign adapter", "model", "gguf", "run" (one
            without an adapter yet), "empty", "none", "file" or "directory".
        words: what it is, to stand after "it is" or "which is".
        base: of an adapter, the name of its base, where it says one.
    """

    kind: str
    words: str
    base: str | None = None


def look_at(path: str | Path) -> Place:
    """What lies at a path; one that cannot be read counts as not there."""
    place = Path(path).expanduser()
    try:
        if place.is_file():
            return _a_file(place)
        if not place.is_dir():
            return Place("none", "nothing: there is no such directory")
        return _a_directory(place)
    except OSError:
        return Place("none", "nothing that can be read")


def no_base(path: Path) -> str:
    """What is wrong with a path that was named as a base and has no config.json, to stand after
    its name."""
    found = look_at(path)
    advice = "name a 16-bit checkpoint's directory or a name on the hub"
    if "adapter" in found.kind:
        over = f" ({found.base})" if found.base else ""
        advice = f"name the base that it was trained over{over}"
    return f"has no config.json: it is {found.words}; {advice}."


def export_words(adapter: str | Path, base: str) -> list[str]:
    """The command that merges an adapter into its base: onto the base's own quantized weights where
    it has no others, by what lies on this machine."""
    words = ["leanlift", "export", str(adapter), "MERGED"]
    file = Path(base).expanduser() / "config.json"
    with suppress(OSError, UserError, ValueError):
        facts = read_json(file, MOST_OF_A_STRANGER)
        if isinstance(facts, dict) and facts.get("quantization_config"):
            return [*words, "--onto", "quantized"]
    return words


def base_directory(name: str, revision: str | None = None) -> Path | None:
    """The directory of a base; None where its name can be one on the hub alone.

    Raises:
        UserError: it is neither a checkpoint directory nor possibly a name.
    """
    path = Path(name).expanduser()
    if not path.exists() and (
        path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    ):
        raise UserError(
            f"the base {name} does not exist: expected a checkpoint directory or hub name."
        )
    if not path.is_dir():
        if path.exists():
            raise UserError(f"the base {name} {no_base(path)}")
        return None
    if revision is not None:
        raise UserError(
            f"the base {name} is a directory, which has no revisions: leave model_revision out."
        )
    if not (path / "config.json").is_file():
        raise UserError(f"the base {name} {no_base(path)}")
    return path


ADAPTER_WRITERS = (
    "expected what save_adapter, a training run or leanlift export --format peft has written"
)


def check_adapter_place(name: str) -> None:
    """Refuse what can be neither a directory with an adapter nor its name on the hub.

    Raises:
        UserError: it is neither; says what it is.
    """
    found = look_at(name)
    if found.kind == "none":
        path = Path(name).expanduser()
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise UserError(f"the adapter {name} does not exist: {ADAPTER_WRITERS}.")
    elif found.kind != "adapter":
        raise UserError(
            f"{name} is no leanlift adapter but {found.words}: expected a directory or a hub name "
            "with an adapter."
        )


def check_merged_place(merged_dir: str, output: Path) -> None:
    """A place for the merge that is free, and will still be when training has ended.

    Raises:
        UserError: it is not.
    """
    merged = Path(merged_dir)
    if merged.exists():
        raise UserError(f"merged_dir {merged} already exists: choose another directory.")
    if merged.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(
            f"merged_dir {merged} is, or holds, output_dir {output}: choose another directory."
        )


def no_room(output: Path, resumable: bool) -> UserError:
    """What is said of an output directory that holds something."""
    way_on = (
        ", or go on from its last checkpoint with --resume_from_checkpoint true"
        if resumable
        else ", or empty it"
    )
    return UserError(f"output_dir {output} is not empty: choose another one{way_on}.")


def _a_file(file: Path) -> Place:
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic == b"GGUF" or file.suffix.lower() == ".gguf":
        return Place("gguf", "a GGUF file, the form of llama.cpp")
    return Place("file", "a file, not a directory")


def _a_directory(directory: Path) -> Place:
    names = {entry.name for entry in directory.iterdir()}
    if CONFIG_NAME in names:
        return _an_adapter(directory)
    if "config.json" in names:
        return Place("model", "a model's checkpoint directory (it has a config.json)")
    steps = checkpoints_in(directory)
    if steps:
        newest = directory / f"checkpoint-{steps[-1]}"
        return Place("run", f"a run that has not ended: its newest checkpoint is {newest}")
    if any(name.lower().endswith(".gguf") for name in names):
        return Place("gguf", "a directory of GGUF files, the form of llama.cpp")
    if not names:
        return Place("empty", "an empty directory")
    return Place("directory", "a directory with neither a model nor an adapter in it")


def checkpoints_in(directory: Path) -> list[int]:
    """Steps of the training checkpoints in a run's directory, in order."""
    found = (re.fullmatch(r"checkpoint-(\d{1,12})", entry.name) for entry in directory.iterdir())
    return sorted(int(match[1]) for match in found if match)


def _an_adapter(directory: Path) -> Place:
    data: Any = None
    with suppress(UserError):
        data = read_json(directory / CONFIG_NAME, MOST_OF_A_STRANGER)
    if not isinstance(data, dict):
        return Place("foreign adapter", f"an adapter whose {CONFIG_NAME} cannot be read")
    kind = adapter_type(data)
    base = data.get("base_model_name_or_path")
    named = base if isinstance(base, str) and base.isprintable() and len(base) < 300 else None
    if kind == OWN_TYPE:
        return Place("adapter", "a leanlift adapter", named)
    if isinstance(kind, str) and kind in PEFT_TYPES:
        return Place("adapter", f"a {PEFT_TYPES[kind]} adapter of PEFT's", named)
    shown = str(data.get("peft_type")) if isinstance(data.get("peft_type"), str) else "unknown"
    shown = shown[:40] if shown.isprintable() else "unknown"
    return Place("foreign adapter", f"an adapter of PEFT's of type {shown}", named)


def adapter_type(data: Any) -> Any:
    """`OWN_TYPE` or one of `PEFT_TYPES` for the content of an adapter_config.json that leanlift
    reads; whatever else it says of itself otherwise."""
    found = data.get("peft_type") if isinstance(data, dict) else None
    return OWN_TYPE if isinstance(found, str) and found.startswith(OWN_TYPE) else found
