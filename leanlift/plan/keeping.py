"""Plans that were made, kept on the disk for the next time.

A plan follows from the model's configuration, the settings and the code alone, so it is kept under
a digest of all of these (of the code: which packages are installed, and when the files of the model
and our own were changed), in `$XDG_CACHE_HOME/leanlift/plans` or `~/.cache/leanlift/plans`: a
checkpoint's own directory may be read-only, or a hub's. The newest are kept. Nothing here is an
error: what cannot be read, or is no plan, is made anew, and where nothing can be written, nothing
is kept. `LEANLIFT_PLANS=off` keeps none and takes none; another value is the directory.

Models with code of their own and rows with images are planned each time: a digest of their
configuration does not say what decides.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from leanlift._version import __version__
from leanlift.config import LiftConfig
from leanlift.io.files import read_json, write_json
from leanlift.layers.lm_head import Objective
from leanlift.measure.meter import CATEGORIES
from leanlift.plan.base import FakeBase
from leanlift.plan.blas import workspace_here
from leanlift.plan.result import MemoryPlan
from leanlift.plan.settings import PlanSettings
from leanlift.plan.work import Part, StepWork

SWITCH, OFF = "LEANLIFT_PLANS", ("off", "0", "false", "no")
INSTALLED = (".dist-info", ".egg-info")
MOST = 200
"""Plans that are kept, some two kilobytes each."""


def kept_plan(key: Callable[[], str | None], make: Callable[[], MemoryPlan]) -> MemoryPlan:
    """A plan that is kept, or one that is made, and kept then.

    Args:
        key: what decides it; None: it is not to be kept. Not asked where none is kept.
        make: makes it.
    """
    place = directory()
    name = None if place is None else key()
    if place is None or name is None:
        return make()
    file = place / f"{name}.json"
    found = _read(file)
    if found is None:
        found = make()
        _write(file, found)
    return found


def directory() -> Path | None:
    """Where plans are kept; None: nowhere."""
    said = os.environ.get(SWITCH, "")
    if said.lower() in OFF:
        return None
    try:
        if said:
            return Path(said).expanduser()
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # nobody's home
        return None
    return Path(caches) / "leanlift" / "plans"


def key_of(
    base: FakeBase, config: LiftConfig, settings: PlanSettings, objective: Objective, method: str
) -> str | None:
    """A digest of all that decides a plan; None where it does not."""
    if base.trust_remote_code or base.images:
        return None
    try:
        beside = Path(inspect.getfile(type(base.shape))).parent
    except (OSError, TypeError):  # a class that is in no file
        return None
    settings = replace(settings, cuda=settings.on_cuda, dtype=settings.dtype_name)
    decides = (
        base.name,
        json.dumps(base.shape.to_dict(), sort_keys=True, default=str),
        type(base.shape).__name__,
        repr(base.stored),
        base.attn_implementation,
        repr(config),
        repr(settings),
        repr(objective),
        method,
        workspace_here() if settings.on_cuda else 0,
        changed(beside.glob("*.py")),
        versions(),
    )
    return hashlib.sha256(repr(decides).encode()).hexdigest()


@cache
def versions() -> tuple[str, ...]:
    """Of the code that plans: the libraries', and when each of our own files was changed, which an
    installation from sources does without another version."""
    libraries = (torch.__version__, transformers.__version__, trl.__version__)
    own = Path(__file__).parents[1].rglob("*.py")
    return __version__, *map(str, libraries), *installed(), changed(own)


def installed() -> list[str]:
    """What packages are installed, in which versions: of some, transformers computes with the
    kernels where they are there."""
    found: set[str] = set()
    for place in filter(os.path.isdir, sys.path):
        with suppress(OSError):
            found |= {name for name in os.listdir(place) if name.endswith(INSTALLED)}
    return sorted(found)


def changed(files: Iterable[Path]) -> str:
    """A digest of when files of code were changed: our own, or those of a model's class, which may
    be somebody's own, or a library's that is worked on."""
    digest = hashlib.sha256()
    for file in sorted(files):
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# --- files ----------------------------------------------------------------------------------


def _read(file: Path) -> MemoryPlan | None:
    """The plan in a file; None: there is none, or something else."""
    try:
        data: dict[str, Any] = read_json(file)
        work = data.pop("work")
        plan = MemoryPlan(**data, work=None if work is None else _work(work))
        if not {"values"} <= set(plan.categories) <= set(CATEGORIES) or plan.peak < 1:
            return None
    except Exception:  # nothing is there, or whatever somebody has put there
        return None
    with suppress(OSError):
        os.utime(file)  # it was of use
    return plan


def _work(data: dict[str, Any]) -> StepWork:
    parts: dict[str, Any] = {k: Part(**v) if isinstance(v, dict) else v for k, v in data.items()}
    return StepWork(**parts)


def _write(file: Path, plan: MemoryPlan) -> None:
    data = asdict(replace(plan, time=None))
    del data["time"]
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, data)
        _forget(file.parent)


def _forget(place: Path) -> None:
    """Remove all but the newest."""
    files = sorted(place.glob("*.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files[MOST:]:
        file.unlink(missing_ok=True)
