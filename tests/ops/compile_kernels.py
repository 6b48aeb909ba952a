"""Compile every kernel for one GPU generation, without a GPU: `compile_kernels.py 90`."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leanlift.ops import triton_adamw as adamw
from leanlift.ops import triton_rows as rows

POINTERS = {
    "codes": "*u8", "absmax": "*u8", "table": "*fp32", "outer": "*fp32", "table256": "*fp32",
    "offset": "*fp32", "columns": "*u8", "counts": "*u8", "ends": "*i32", "row_ends": "*i32",
    "values": "*bf16",
    "columns2": "*u8", "counts2": "*u8", "ends2": "*i32", "values2": "*bf16",
    "scale": "fp32", "scale2": "fp32", "start": "i32", "before": "i32",
    "before2": "i32", "n": "i32", "S": "i32",
}  # fmt: skip


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> None:
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert compiled.asm["cubin"]


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
        constants = {"EIGHT": eight, "CLAMP": True, "STOCHASTIC": dtype == "bf16", "ROWS": 4}
        unasked = {**constants, "apply": None, "ASKS": False}
        compile_kernel(adamw.adamw_kernel, types, unasked, target)
        types["apply"] = "*u8"
        compile_kernel(adamw.adamw_kernel, types, {**constants, "ASKS": True}, target)


if __name__ == "__main__":
    main()
