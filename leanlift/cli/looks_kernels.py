"""What `leanlift doctor` tries: operations on a few numbers, against plain ones."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

from leanlift.cli.looks import Look
from leanlift.errors import first_line

SHAPE = (64, 192)
BLOCK = 64
WIDEST = 0.17
"""Half of NF4's widest gap is 0.152 of a block's largest value; double quantization adds 0.01."""

ROUNDING = 1e-5


def kernels() -> Look:
    """Which implementations run here, and whether bitsandbytes' are right on this machine."""
    found = Look()
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cpu"), *(torch.device("cuda", n) for n in range(cards))]
    wanted = cards and sys.platform == "linux"  # Triton is made for, and is no loss without
    found.tell("Triton", _imported("triton", found if wanted else None))
    for device in devices:
        _tell(found, f"ops, {device}", _ops(device), OPS)
    found.tell("bitsandbytes", _imported("bitsandbytes", found))
    for device in devices if sys.modules.get("bitsandbytes") else ():
        _tell(found, f"NF4, {device}", _four_bits(device), FOUR_BITS)
    return found


OPS = "leanlift's operations are wrong on {}: set ops=torch, and report it."
FOUR_BITS = (
    "bitsandbytes' 4-bit weights are wrong on {}: see python -m bitsandbytes, and train over 16 "
    "bits (load_in_4bit=false) until they are right."
)


def _tell(found: Look, label: str, said: str, problem: str) -> None:
    """What came of trying; it begins with "wrong" where it is."""
    found.tell(label, said)
    if said.startswith("wrong"):
        found.problems.append(problem.format(label.partition(", ")[2]))


def _imported(name: str, found: Look | None) -> str:
    """Its version; where it cannot be imported, that, as a problem if there is a `found`."""
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a library of its own that does not load raises what it likes
        said = f"cannot be imported ({first_line(error).rstrip('.')})"
        if found is not None:
            found.problems.append(f"{name} {said}: pip install --force-reinstall {name}.")
        return said
    return str(getattr(module, "__version__", "there"))


def _numbers() -> torch.Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))


def _ops(device: torch.device) -> str:
    """The effective weight by the implementation that a run would take."""
    from leanlift.ops import resolve, tile_ops
    from leanlift.sparse import Offsets
    from leanlift.tiles import as_tiles

    weight = _numbers()
    flat = torch.arange(0, weight.numel(), 20)
    values = torch.linspace(-1, 1, flat.numel())
    wanted = weight.clone().view(-1)
    wanted[flat] += values
    try:
        name = resolve("auto", device)
        offsets = Offsets.from_flat(flat.to(device), values.to(device), SHAPE)
        out = torch.empty(SHAPE, device=device)
        tile_ops("auto", device).effective_rows(
            as_tiles(weight.to(device)), (offsets,), 0, SHAPE[0], out
        )
        off = float((out.cpu().view(-1) - wanted).abs().max())
    except Exception as error:
        return f"wrong: {first_line(error)}"
    return f"{name}, right" if off < ROUNDING else f"wrong: {name} is {off:.2g} off"


def _four_bits(device: torch.device) -> str:
    """There and back: every value within half the widest gap of NF4, and not all of it exact."""
    values = _numbers()
    try:
        from leanlift.weights.bnb import dequantize_4bit_range, quantize_4bit

        module: Any = quantize_4bit(
            lambda start, stop: values[start:stop],
            SHAPE, "nf4", BLOCK, True, torch.float32, device,
        )  # fmt: skip
        back = dequantize_4bit_range(module, 0, values.numel()).cpu().view(-1, BLOCK)
    except Exception as error:
        return f"wrong: {first_line(error)}"
    blocks = values.view(-1, BLOCK)
    worst = float(((back - blocks).abs().amax(1) / blocks.abs().amax(1)).max())
    right = 0 < worst < WIDEST
    return "right" if right else f"wrong: values come back {worst:.0%} of the largest away"
