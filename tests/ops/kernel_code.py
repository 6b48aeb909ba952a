"""What every kernel is compiled to for one GPU generation, without a GPU: `kernel_code.py 90`.

Compiles what `compile_kernels.py` does, with what a launch knows besides (tensors begin at 16
bytes, rows of a whole number of them), and prints a line of JSON for each: registers a thread,
loads and stores of what did not fit them, and how wide those of global memory are, in bits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import compile_kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
SHOWN = ("KIND", "ALIGNED", "STORES", "EIGHT", "STOCHASTIC", "ASKS")
"""Constants by which a kernel's forms are told apart."""


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    **options: int,
) -> None:
    """In the place of `compile_kernels.compile_kernel`."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    known = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name == "n"
    }
    source = ASTSource(kernel, signature, constants, known)
    options = {"enable_fp_fusion": False, **options}
    cubin = triton.compile(source, target=target, options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (_told(option, file.name) for option in ("-res-usage", "-sass"))
    told = [f"{name}={constants[name]}" for name in SHOWN if constants.get(name) is not None]
    dtypes = [types[n] for n in ("out", "value") if n in names and n in types]
    found = {
        "triton": triton.__version__,
        "kernel": " ".join([kernel.__name__, *told, *dtypes]),
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", code, re.MULTILINE)),
        "loads": _widths("LDG", code),
        "stores": _widths("STG", code),
    }
    print(json.dumps(found))


def _told(option: str, file: str) -> str:
    return subprocess.run([TOOL, option, file], check=True, capture_output=True, text=True).stdout


def _widths(operation: str, code: str) -> str:
    """How many instructions of each width in bits, the widest first: "128:2 32:1"."""
    counts: dict[int, int] = {}
    for suffixes in re.findall(rf"\b{operation}((?:\.\w+)*)", code):
        parts = suffixes.split(".")
        width = next((WIDTHS[part] for part in parts if part in WIDTHS), 32)
        counts[width] = counts.get(width, 0) + 1
    return " ".join(f"{width}:{count}" for width, count in sorted(counts.items(), reverse=True))


if __name__ == "__main__":
    assert len(sys.argv) == 2
    compile_kernels.compile_kernel = compiled
    compile_kernels.main()
