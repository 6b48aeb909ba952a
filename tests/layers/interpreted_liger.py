"""Liger's kernels within a model beside what they replace, in Triton's interpreter: run by
`test_fused_elementwise` in a process of its own, since the interpreter is chosen when Triton is
imported.

    python interpreted_liger.py FAMILY...

Prints a JSON object a family: what was replaced, and how far loss and gradients are apart.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import liger_kernel.ops.geglu as geglu
import liger_kernel.ops.rms_norm as rms_norm
import numpy as np
import torch
import triton
import triton.language as tl
from families import config_of
from transformers import AutoModelForCausalLM
from triton.runtime import interpreter

from leanlift.layers.fused_elementwise import use_fused_elementwise
from leanlift.layers.fused_glu import use_stock_glu

_converted = interpreter._implicit_cvt


def converted(argument: Any) -> Any:
    """As a compiled kernel has it: a Python float is a scalar in fp32."""
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _converted(argument)


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


interpreter._implicit_cvt = converted
rms_norm.rsqrt, geglu.tanh = rsqrt, tanh
"""The interpreter has nothing of libdevice."""


def step(model: Any) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
    ids = torch.arange(2 * 9).view(2, 9) % 60 + 2
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return float(out.loss.detach()), out.logits.detach(), grads


def compared(family: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
        if "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    fused = copy.deepcopy(model)
    found = use_fused_elementwise(fused)
    loss, logits, grads = step(model)
    fused_loss, fused_logits, fused_grads = step(fused)
    use_stock_glu(fused)
    _, logits_again, grads_again = step(fused)
    pairs = list(zip(grads, fused_grads, strict=True))
    return {
        "family": family,
        **found,
        "loss": abs(fused_loss / loss - 1),
        "logits": float((fused_logits - logits).norm() / logits.norm()),
        "gradients": max(float((b - a).norm() / a.norm().clamp_min(1e-12)) for a, b in pairs),
        "stock again": torch.equal(logits, logits_again)
        and all(map(torch.equal, grads, grads_again)),
    }


if __name__ == "__main__":
    for each in sys.argv[1:]:
        print(json.dumps(compared(each)), flush=True)
