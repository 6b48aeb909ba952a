"""What `leanlift doctor` looks at. A look may fail in any way: whoever makes it tells so."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanlift._version import __version__
from leanlift.errors import first_line
from leanlift.format import size
from leanlift.io.machine import machine_nbytes

SECONDS = 20
"""Most that another program is waited for."""


@dataclass
class Look:
    """What was found.

    Attributes:
        name: of what was looked at.
        facts: JSON-ready.
        lines: label and text each; without a label the text is a line as it is.
        problems: a sentence each: what is wrong, and what to do.
    """

    name: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def tell(self, label: str, text: str, fact: Any = None) -> None:
        """Note a fact; as JSON it is the text, where it is no other."""
        self.lines.append((label, text))
        self.facts[label] = text if fact is None else fact


# --- what is installed ------------------------------------------------------------------------


def software() -> Look:
    """Versions of what leanlift needs and can use, and whether they are within the bounds that it
    states."""
    found = Look()
    found.tell("leanlift", __version__)
    found.tell("Python", platform.python_version())
    try:
        needs = importlib.metadata.requires("leanlift") or []
    except importlib.metadata.PackageNotFoundError:
        found.problems.append(
            "leanlift is not installed as a package, so nobody knows which versions it takes: pip "
            "install leanlift, or pip install -e . in its repository."
        )
        return found
    for name, (bounds, optional) in sorted(_bounds(needs).items()):
        _look_at_version(found, name, bounds, optional)
    return found


def _bounds(needs: list[str]) -> dict[str, tuple[Any, bool]]:
    """Name -> the versions that are taken, and whether it is only an extra's; what developers use
    is left out."""
    from packaging.requirements import Requirement

    found: dict[str, tuple[Any, bool]] = {}
    for line in needs:
        need = Requirement(line)
        extras = ("", "triton", "plots", "images", "serving")
        wanted = [e for e in extras if need.marker is None or need.marker.evaluate({"extra": e})]
        if wanted:
            optional = "" not in wanted
            if need.name not in found or not optional:
                found[need.name] = (need.specifier, optional)
    return found


def _look_at_version(found: Look, name: str, bounds: Any, optional: bool) -> None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found.tell(name, "not installed" + ", and only some features need it" * optional)
        if not optional:
            found.problems.append(f"{name} is not installed: pip install '{name}{bounds}'.")
        return
    found.tell(name, version)
    if not bounds.contains(version, prereleases=True):
        found.problems.append(
            f"{name} {version} is installed, and leanlift takes {bounds}: pip install "
            f"'{name}{bounds}'."
        )


# --- the machine ------------------------------------------------------------------------------


def machine() -> Look:
    """The system, its processor and its memory."""
    import torch

    found = Look()
    found.tell("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    mkldnn = torch.backends.mkldnn.is_available()
    bf16 = mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    capability = torch.backends.cpu.get_cpu_capability()
    found.tell(
        "processor",
        f"{os.cpu_count()} threads, of which torch takes {torch.get_num_threads()}; {capability}, "
        f"bf16 products {'fast' if bf16 else 'slow'}",
        {
            "threads": os.cpu_count(), "torch_threads": torch.get_num_threads(),
            "capability": capability, "bf16": bf16,
        },
    )  # fmt: skip
    nbytes = machine_nbytes()
    found.tell("memory", "not told by this system" if nbytes is None else size(nbytes), nbytes)
    return found


# --- cards ------------------------------------------------------------------------------------


def cards() -> Look:
    """Each card: memory, capability, and whether this torch has kernels for it."""
    import torch

    found = Look()
    driver = _driver()
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else None
    found.tell("torch for", built or "the CPU alone")
    found.tell("driver", driver or "none found")
    with warnings.catch_warnings(record=True) as said:  # why CUDA cannot be used
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if driver and not usable:
        why = first_line(said[0].message) if said and isinstance(said[0].message, Warning) else ""
        found.problems.append(
            f"there is an NVIDIA driver, {driver}, and this torch "
            + (f"cannot use it: take a newer driver. {why}" if built else "is for the CPU alone: ")
            + ("" if built else "install torch for CUDA, see https://pytorch.org/get-started.")
        )
    if not usable:
        found.tell("cards", "none: runs go on the CPU", [])
        return found
    found.facts["cards"] = [_look_at_card(found, n) for n in range(torch.cuda.device_count())]
    return found


def _look_at_card(found: Look, number: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    capability = (properties.major, properties.minor)
    facts = {
        "name": properties.name,
        "total": total,
        "free": free,
        "capability": list(capability),
        "bf16": torch.cuda.is_bf16_supported(),
    }
    found.lines.append(
        (
            f"card {number}",
            f"{properties.name}, {size(total)}, {size(free)} free; compute capability "
            f"{capability[0]}.{capability[1]}",
        )
    )
    compiled = torch.cuda.get_arch_list()
    if torch.version.cuda and compiled and not has_kernels(capability, compiled):
        found.problems.append(
            f"this torch has no kernels for {properties.name} (compute capability "
            f"{capability[0]}.{capability[1]}; it has {', '.join(compiled)}): install a torch "
            "whose CUDA knows the card."
        )
    return facts


def has_kernels(capability: tuple[int, int], compiled: list[str]) -> bool:
    """Whether code that was compiled for `compiled` ("sm_80", "compute_90", …) runs on a card: for
    the same major number and no later minor one ("sm_90a": that one alone), or to be compiled by
    the driver from an earlier one."""
    for name in compiled:
        kind, _, number = name.partition("_")
        digits = "".join(each for each in number if each.isdigit())
        if not digits:
            continue
        major, minor = divmod(int(digits), 10)
        if kind == "sm" and number.endswith("a"):
            if (major, minor) == capability:
                return True
        elif kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def card_sizes() -> list[float]:
    """GiB of this machine's cards, each size once; none where there is no card, or no torch."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = {torch.cuda.get_device_properties(n).total_memory for n in range(count)}
    except Exception:  # told by the look at the cards
        return []
    return sorted(nbytes / 2**30 for nbytes in found)


def _driver() -> str | None:
    """NVIDIA's driver, by its own program; None where that is not there or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


# --- the hub ----------------------------------------------------------------------------------


def hub() -> Look:
    """Where checkpoints are kept, and how much room there is."""
    from huggingface_hub import constants

    found = Look()
    place = Path(constants.HF_HUB_CACHE)
    there = next((each for each in (place, *place.parents) if each.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    found.tell("cache", f"{place}{'' if place.exists() else ' (not made yet)'}", str(place))
    found.tell("room", f"{size(free)} free; a 7B base takes some 15 GB", free)
    offline = bool(constants.HF_HUB_OFFLINE)
    used = "not used: HF_HUB_OFFLINE is set" if offline else "used for names on the hub"
    found.tell("network", used, offline)
    if not os.access(there, os.W_OK):
        found.problems.append(
            f"{there} cannot be written, where the hub's files go: set HF_HOME to another place."
        )
    return found
