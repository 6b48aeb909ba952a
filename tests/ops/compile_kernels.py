"""Compile every kernel for one GPU generation, without a GPU: `compile_kernels.py 90`.

Of the product by strips also: that registers suffice, that both factors come in 16 bytes at a time,
and that tensor cores multiply them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leanlift.ops import triton_adamw as adamw
from leanlift.ops import triton_rows as rows
from leanlift.ops import triton_strips as strips

POINTERS = {
    "codes": "*u8", "absmax": "*u8", "table": "*fp32", "outer": "*fp32", "table256": "*fp32",
    "offset": "*fp32", "columns": "*u8", "counts": "*u8", "ends": "*i32", "row_ends": "*i32",
    "values": "*bf16",
    "columns2": "*u8", "counts2": "*u8", "ends2": "*i32", "values2": "*bf16",
    "scale": "fp32", "scale2": "fp32", "start": "i32", "before": "i32",
    "before2": "i32", "n": "i32", "S": "i32",
}  # fmt: skip
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    **options: int,
) -> None:
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False, **options})
    assert compiled.asm["cubin"]


def stack_bytes(cubin: bytes) -> int:
    """Local memory that a thread of a compiled kernel needs: what does not fit registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (used,) = [word for word in shown.split() if word.startswith("STACK:")]
    return int(used.removeprefix("STACK:"))


def compile_strips(target: GPUTarget) -> None:
    """The product by strips in every dtype, with arguments as aligned as at a launch."""
    kernel = strips.strips_kernel
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        constants = strips.product_constants(dtype)
        types = dict.fromkeys(("turned", "right", "dense"), f"*{name}")
        types |= {"rows": "*i16", "strips": "*i32", "T": "i32", "N": "i32"}
        signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
        options = {"num_warps": strips.PRODUCT_WARPS, "num_stages": strips.STAGES}
        options["enable_fp_fusion"] = True
        source = ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=target, options=options)
        ptx = compiled.asm["ptx"]
        assert stack_bytes(compiled.asm["cubin"]) == 0, "the product spills registers"
        assert "cp.async.cg" in ptx, "factors are not read in 16 bytes"
        assert "cp.async.ca" not in ptx, "factors are read in small pieces"
        assert name == "fp32" or any(i in ptx for i in TENSOR_CORES), "no tensor core is used"
    index = {"SEGMENT": 255, "PADDED": 64, "CHUNK": 64, "ENTRIES": 128}
    types = {**POINTERS, "dense": "*bf16", "out": "*bf16", "ranks": "*i32", "N": "i32"}
    compile_kernel(strips.gather_sorted_kernel, types, index, target)


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    index = {"SEGMENT": 255, "PADDED": 64, "CHUNK": 64, "ENTRIES": 128}
    unused = dict.fromkeys(("table", "outer", "table256", "offset"))  # None, as at a launch
    nested = dict.fromkeys(("outer", "table256", "offset"))
    forms: dict[Any, tuple[dict[str, str], dict[str, None]]] = {
        rows.DENSE: ({"codes": "*bf16"}, {"absmax": None, **unused}),
        rows.INT8: ({"codes": "*i8", "absmax": "*fp32"}, unused),
        rows.FOUR: ({"absmax": "*fp32"}, nested),
        rows.NESTED: ({}, {}),
    }
    second = dict.fromkeys(("columns2", "counts2", "ends2", "values2"))
    first = dict.fromkeys(("columns", "counts", "ends", "values"))
    stores: dict[int, dict[str, None]] = {0: {**first, **second}, 1: second, 2: {}}
    for (kind, (types, absent)), count in product(forms.items(), stores):
        dtype = ("fp32", "fp16", "bf16")[count]
        constants = {
            "BLOCK": 64, "OUTER": 256, "WEIGHT": rows.tl.bfloat16, "KIND": kind.value,
            "ALIGNED": dtype == "bf16", "STORES": count, "BLOCKS": 32, "WIDE": 1024,
            **index, **absent, **stores[count],
        }  # fmt: skip
        types = {**POINTERS, **types, "out": f"*{dtype}"}
        compile_kernel(rows.effective_rows_kernel, types, constants, target)
    compile_kernel(
        rows.gather_kernel, {**POINTERS, "dense": "*bf16", "out": "*fp32"}, index, target
    )
    for eight, dtype in product((True, False), ("bf16", "fp32")):
        types = dict.fromkeys(("first_absmax", "second_absmax"), "*fp32")
        types |= dict.fromkeys(("first_table", "second_table"), "*fp32")
        types |= dict.fromkeys(("first", "second"), "*u8" if eight else "*fp32")
        types |= dict.fromkeys(("value", "grad"), f"*{dtype}")
        types |= dict.fromkeys(("count", "seed"), "i32")
        types |= dict.fromkeys(("lerp", "beta2", "eps", "keep", "rate", "bound"), "fp32")
        constants = {"EIGHT": eight, "CLAMP": True, "STOCHASTIC": dtype == "bf16"}
        constants["ROWS"], limit = adamw.ROWS, {"maxnreg": adamw.REGISTERS}
        unasked = {**constants, "apply": None, "ASKS": False}
        compile_kernel(adamw.adamw_kernel, types, unasked, target, **limit)
        types["apply"] = "*u8"
        compile_kernel(adamw.adamw_kernel, types, {**constants, "ASKS": True}, target, **limit)
    compile_strips(target)


if __name__ == "__main__":
    main()
