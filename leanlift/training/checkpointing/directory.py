"""The checkpoints of a run: written whole, rotated, found again.

A checkpoint is assembled in `.saving/` and renamed when it is whole. Written last,
`checkpoint.json` seals it: the settings of the run, and a digest of every file, so that what was
damaged later is found whatever it is (`whole`).

Rotation goes by the number of the step. What shall go is renamed first, so that a kill while files
are deleted leaves no half a checkpoint under a checkpoint's name.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from leanlift._version import __version__
from leanlift.errors import OutOfMemoryError, UserError, first_line
from leanlift.io.tensors import (
    digest_of,
    remove_partials,
    sync_directory,
    sync_tree,
    write_json,
)
from leanlift.measure import is_out_of_memory
from leanlift.processes import is_first, wait_for_all
from leanlift.training.checkpointing.names import (
    FORMAT_VERSION,
    REMOVED,
    SEAL,
    STAGING,
    step_of,
)
from leanlift.training.checkpointing.whole import Checkpoint, check_checkpoint, digest_of_content

logger = logging.getLogger("leanlift")


# --- writing -------------------------------------------------------------------------------


@contextmanager
def assembled(run: Path, step: int, settings: dict[str, Any]) -> Iterator[Path]:
    """A directory in which the checkpoint of a step is assembled; put in place if all goes well. Of
    several processes the first one does it, and the others wait.

    Args:
        run: the run's output directory.
        step: optimizer steps taken.
        settings: of the run.

    Raises:
        UserError, OutOfMemoryError: see `keeping_what_was_good`; nothing of it is left.
    """
    staging = run / STAGING
    if not is_first():
        yield staging
        wait_for_all()
        return
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with keeping_what_was_good(f"the checkpoint of step {step}", run):
            yield staging
            put_in_place(staging / f"{PREFIX_CHECKPOINT_DIR}-{step}", settings)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    wait_for_all()


def put_in_place(staged: Path, settings: dict[str, Any]) -> Path:
    """Seal a staged checkpoint and give it its place; one that stands there goes.

    Args:
        staged: `<output_dir>/.saving/checkpoint-N`, complete.
        settings: of the run.

    Returns:
        Where it is now.
    """
    files = sorted(file for file in staged.rglob("*") if file.is_file() and file.name != SEAL)
    content = {
        "format_version": FORMAT_VERSION,
        "leanlift_version": __version__,
        "step": step_of(staged),
        "settings": settings,
        "files": {file.relative_to(staged).as_posix(): digest_of(file) for file in files},
    }
    write_json(staged / SEAL, {**content, "digest": digest_of_content(content)})
    sync_tree(staged)
    final = staged.parent.parent / staged.name
    removed = _set_aside(final)
    staged.rename(final)
    sync_directory(final.parent)
    if removed is not None:
        shutil.rmtree(removed, ignore_errors=True)
    return final


def rotate(output_dir: Path, limit: int | None, current: Path, best: str | None) -> None:
    """Delete what exceeds `limit` checkpoints; never `current`, the one just written, nor `best`.

    Checkpoints of later steps are of a run that this one took the place of: they go first, then
    the oldest.
    """
    if limit is None or limit <= 0:
        return
    found = checkpoints(output_dir)
    kept = {current.resolve()} | ({Path(best).resolve()} if best else set())
    kept &= {path.resolve() for _, path in found}
    now = step_of(current)
    order = [path for step, path in reversed(found) if step > now]
    order += [path for step, path in found if step <= now]
    order = [path for path in order if path.resolve() not in kept]
    for path in order[: max(0, len(found) - max(limit, len(kept)))]:
        try:
            removed = _set_aside(path)
        except OSError as error:
            logger.warning("%s could not be deleted (%s).", path, error.strerror)
            continue
        if removed is not None:
            shutil.rmtree(removed, ignore_errors=True)


def clean(output_dir: Path) -> None:
    """Delete what a killed run has left half-written or half-deleted."""
    if not output_dir.is_dir():
        return
    for left in (output_dir / STAGING, *output_dir.glob(f"{REMOVED}*")):
        shutil.rmtree(left, ignore_errors=True)
    remove_partials(output_dir)


def is_left_behind(path: Path) -> bool:
    """Whether something in an output directory is only what `clean` would delete."""
    return path.name == STAGING or path.name.startswith(REMOVED) or path.name.endswith(".partial")


def _set_aside(path: Path) -> Path | None:
    """Take a checkpoint's name away, in one operation; None where there is nothing."""
    if not path.exists():
        return None
    aside = path.with_name(REMOVED + path.name)
    while aside.exists():  # Windows keeps what is still read
        aside = aside.with_name(aside.name + "-")
    path.rename(aside)
    return aside


@contextmanager
def keeping_what_was_good(what: str, output_dir: str | Path) -> Iterator[None]:
    """Say in one sentence that `what` could not be written, and what there is.

    Raises:
        OutOfMemoryError: memory ran out.
        UserError: the disk is full, or the system refused otherwise.
    """
    try:
        yield
    except UserError as error:
        said, kept = first_line(error).rstrip("."), last_checkpoint(output_dir)
        raise type(error)(f"{what} is not written: {said}; {kept}.") from error
    except Exception as error:  # each library has its own kind for a full disk
        said, kept = first_line(error).rstrip("."), last_checkpoint(output_dir)
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory while writing {what} ({said}); {kept}."
            ) from error
        if not isinstance(error, (OSError, SafetensorError)) and not _is_of_the_disk(said):
            raise
        raise UserError(
            f"{what} could not be written ({said}); {kept}: make room, for instance with "
            "save_total_limit, and go on with resume_from_checkpoint."
        ) from error


def _is_of_the_disk(said: str) -> bool:
    signs = ("os error", "space left", "quota", "pytorchstreamwriter", "file write failed")
    return any(sign in said.lower() for sign in signs)


# --- finding -------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[tuple[int, Path]]:
    """Step and path of every `checkpoint-N`, oldest first; nothing is looked into."""
    found = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and path.is_dir()
    ]
    return sorted(found)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The latest `checkpoint-N` that a run can go on from, or None; passing over others is said."""
    found, _ = _newest_whole(output_dir)
    return None if found is None else str(found.path)


def checkpoint_to_resume(output_dir: str | Path, wanted: str | bool) -> Checkpoint:
    """The checkpoint to go on from.

    Args:
        output_dir: of the run.
        wanted: True for the latest one that is whole, or a path.

    Raises:
        UserError: there is none, or the one at the path is damaged.
    """
    if not isinstance(wanted, bool):
        return check_checkpoint(Path(wanted))
    found, problems = _newest_whole(output_dir)
    if found is None:
        reason = f" ({problems[0].rstrip('.')})" if problems else ""
        raise UserError(
            f"{output_dir} holds no whole checkpoint to resume from{reason}: start without "
            "resume_from_checkpoint."
        )
    return found


def last_checkpoint(output_dir: str | Path) -> str:
    """What to say of the last checkpoint when a run ends early."""
    last = last_whole_checkpoint(output_dir)
    if last is not None:
        return f"the last checkpoint is {last}"
    some = bool(checkpoints(output_dir))
    return "no checkpoint can be gone on from" if some else "there is no checkpoint yet"


def _newest_whole(output_dir: str | Path) -> tuple[Checkpoint | None, list[str]]:
    problems: list[str] = []
    for _, path in reversed(checkpoints(output_dir)):
        try:
            return check_checkpoint(path), problems
        except UserError as error:
            logger.warning("Passing over %s: %s", path, error)
            problems.append(str(error))
    return None, problems
