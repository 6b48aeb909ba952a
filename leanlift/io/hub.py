"""Names on the Hugging Face hub as sources, and as places to push to."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from leanlift.errors import UserError, first_line
from leanlift.io.tensors import read_json, write_json

logger = logging.getLogger("leanlift")

_FAILURES = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, RuntimeError)


def local_copy(
    source: str | Path,
    files: Sequence[str],
    what: str,
    advice: str,
    revision: str | None = None,
) -> Path:
    """A local directory, or the local snapshot of a hub name.

    Args:
        source: a directory, or a name such as "user/model".
        files: patterns of the files that are wanted of a hub name; nothing else is fetched.
        what: "the base" or "the adapter", for messages.
        advice: what to do where it is neither.
        revision: of a hub name; None: its main branch.

    Raises:
        UserError: neither.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        looks_like_a_path = path.is_absolute() or str(source).startswith(".")
        if looks_like_a_path or str(source).count("/") > 1:
            raise UserError(f"{what} {source} does not exist: {advice}.")
        check_name(str(source), what, "its revision")
        return _snapshot(str(source), list(files), revision)
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(
            f"{what} {source} is neither a directory nor a name that can be had from the hub "
            f"({first_line(error).rstrip('.')}): {advice}."
        ) from None


def _snapshot(name: str, files: list[str], revision: str | None) -> Path:
    """The snapshot of a hub name; without the hub, the one that is cached: some versions ask the
    hub for the files of a commit that they have."""
    try:
        return Path(snapshot_download(name, allow_patterns=files, revision=revision))
    except _FAILURES:
        try:
            cached = snapshot_download(
                name, allow_patterns=files, revision=revision, local_files_only=True
            )
        except _FAILURES:
            cached = None
        if cached is None:
            raise
        return Path(cached)


def has_file(name: str, file: str) -> bool:
    """Whether a model on the hub has a file: by what is cached, else by asking; False where nobody
    answers."""
    if isinstance(try_to_load_from_cache(name, file), str):
        return True
    try:
        return bool(HfApi().file_exists(name, file))
    except _FAILURES:
        return False


def check_name(name: str, what: str, option: str) -> None:
    """Refuse `user/model@revision`, which no hub name is.

    Raises:
        UserError: it is one; `option` says where a revision goes.
    """
    bare, at, revision = name.partition("@")
    if at:
        raise UserError(
            f"{what} {name} is no name on the hub: give {bare} as the name and "
            f"{revision or 'the revision'} as {option}."
        )


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a hub name's local snapshot; None for a directory, and where there is none."""
    directory = snapshot_of(name, revision)
    return None if directory is None or directory == Path(name).expanduser() else directory.name


def snapshot_of(name: str, revision: str | None = None) -> Path | None:
    """Where a checkpoint lies on this machine: a directory, or a hub name's snapshot, if it has
    been fetched; nothing is fetched now."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except (HFValidationError, OSError, ValueError, RuntimeError):  # no name that there can be
        return None
    return Path(found).parent if isinstance(found, str) else None


def inside(directory: Path, file: Path) -> Path | None:
    """What a file of a directory really is; None where it leads out of it."""
    home, target = directory.resolve(), file.resolve()
    cache = home.parent.parent / "blobs"  # a snapshot of the hub is made of links to there
    return target if target.is_relative_to(home) or target.is_relative_to(cache) else None


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    private: bool = False,
    message: str = "Upload with leanlift",
) -> str:
    """Upload an adapter or a merged checkpoint; returns the address of the commit.

    What only a resume needs (training checkpoints, optimizer state, memory timelines) stays here,
    and so do the paths of this machine: of the base's, only the last part is sent.

    Args:
        directory: from `save_adapter`, a training run, `combine_adapters` or an export.
        repo_id: "user/name"; made if it does not exist.
        private: whether it is made as a private one.
        message: of the commit.

    Raises:
        UserError: no such directory, or nothing of leanlift's in it, or the hub refuses.
    """
    path = Path(directory)
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        raise UserError(
            f"{directory} is neither an adapter nor a checkpoint: expected a directory with "
            ".safetensors files in it."
        )
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with _without_paths(path) as folder:
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=message,
                allow_patterns=list(PUSHED),
                ignore_patterns=list(NOT_PUSHED),
            )
    except UserError:
        raise
    except _FAILURES as error:
        raise UserError(f"the hub does not take {directory}: {first_line(error)}") from None
    return str(done.commit_url)


PUSHED = ("*.safetensors", "*.json", "*.md", "*.model", "*.txt", "*.jinja", "*.png")
NOT_PUSHED = ("*/*", "optimizer*", "trainer_state.json", "run.json", ".*")

DESCRIBING = ("adapter_config.json", "leanlift.json", "memory.json", "config.json")
"""Files in which leanlift, or a checkpoint, says where something lies."""


@contextmanager
def _without_paths(directory: Path) -> Iterator[Path]:
    """A directory with links to these files, and copies without paths of those that have some."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in directory.iterdir():
            if not file.is_file() or inside(directory, file) is None:
                continue
            cut: list[str] = []
            if file.name in DESCRIBING:
                data = _shortened(read_json(file), cut)
            if cut:
                write_json(folder / file.name, data)
                logger.warning(
                    "%s is sent without the paths of this machine: only %s of them.",
                    file.name,
                    ", ".join(sorted(set(cut))[:5]),
                )
                continue
            try:
                (folder / file.name).symlink_to(file.absolute())
            except OSError:  # a system on which not everybody may make links
                shutil.copyfile(file, folder / file.name)
        yield folder


def _shortened(data: Any, cut: list[str]) -> Any:
    """JSON with the last part of each local path in place of the whole; `cut` collects them."""
    if isinstance(data, dict):
        return {key: _shortened(value, cut) for key, value in data.items()}
    if isinstance(data, list):
        return [_shortened(value, cut) for value in data]
    if isinstance(data, str) and _is_local_path(data):
        cut.append(re.split(r"[\\/]+", data.rstrip("\\/"))[-1] or "base")
        return cut[-1]
    return data


def _is_local_path(text: str) -> bool:
    """A path of this machine or of any other: absolute, from a home, or relative and there."""
    if re.match(r"(/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\)", text):
        return "\n" not in text
    return ("/" in text or "\\" in text) and len(text) < 1000 and Path(text).exists()
