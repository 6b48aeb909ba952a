"""Models to measure beside each other: Llama shapes in NF4 with random weights, trained by
leanlift, by PEFT's LoRA and by PEFT's SHiRA, over the same kind of bitsandbytes Linears.

Nothing is read from disk: the model is made on the device and quantized one Linear at a time.
"""

from __future__ import annotations

import warnings
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from leanlift import LiftConfig, get_lift_model
from leanlift.layers.lm_head import head_loss
from leanlift.model import claim, output_head
from leanlift.model.hidden import base_of

SPECTRUM = 256
"""Rank of what stands out of the noise, so that there are principal weights to find."""


def llama(hidden: int, layers: int, vocabulary: int = 32000) -> LlamaConfig:
    """Llama-2's proportions at any width."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 128),
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_cache=False,
    )


def nf4_llama(
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    quantized: bool = True,
) -> Any:
    """A Llama whose Linears inside the blocks are `Linear4bit` with double quantization, and whose
    attention is torch's; not `quantized`: the same weights in `dtype`."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    generator = torch.Generator(device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            m, n = module.weight.shape
            weight = _matrix(m, n, generator, device)
            if quantized:
                model.set_submodule(name, _linear4bit(weight, dtype, device))
            else:
                module.weight = nn.Parameter(weight.to(dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            fill = torch.ones if parameter.dim() == 1 else _noise
            made = fill(*parameter.shape, device=device, dtype=dtype)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(made))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model.requires_grad_(False).train()


def _noise(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return (0.02 * torch.randn(*shape, device=device)).to(dtype)


def _matrix(m: int, n: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Noise and a falling spectrum above it, of a trained matrix's size."""
    weight = torch.randn(m, n, generator=generator, device=device)
    left = torch.randn(m, SPECTRUM, generator=generator, device=device)
    left *= 0.5 * torch.arange(1, SPECTRUM + 1, device=device) ** -0.6
    weight.mul_(0.5).addmm_(left, torch.randn(SPECTRUM, n, generator=generator, device=device))
    return weight.mul_(0.02 / float(weight.std()))


def _linear4bit(weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> nn.Module:
    m, n = weight.shape
    module = bnb.nn.Linear4bit(
        n, m, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    module.weight = bnb.nn.Params4bit(
        weight.to(dtype), requires_grad=False, quant_type="nf4", module=module
    ).to(device)
    return module


def mark_quantized(model: Any) -> Any:
    """What PEFT asks a model that stock transformers has loaded in 4 bits."""
    model.is_loaded_in_4bit = True
    return model


def lora(model: Any, rank: int, dtype: torch.dtype | None = None) -> Any:
    """PEFT LoRA of this rank on every Linear of the blocks, as QLoRA has it.

    Args:
        model: in 4 bits.
        rank: of every adapter.
        dtype: of the adapters; None: the model's, in which leanlift's values are too. TRL trains
            them in bf16 over a quantized base, PEFT itself keeps them in fp32.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(mark_quantized(model), config, autocast_adapter_dtype=False)
    for parameter in trained(peft_model):  # as TRL does it, which PEFT alone does not always
        parameter.data = parameter.data.to(dtype or model.dtype)
    return peft_model


def super_tuning(model: Any, density: float) -> Any:
    """PEFT's Super-Tuning of a 16/32-bit model: the largest entries of every Linear of the blocks.

    Raises:
        ImportError: this PEFT has none.
    """
    from peft import SupertuningConfig, get_peft_model

    targets = _linears(model, nn.Linear)
    config = SupertuningConfig(target_modules=targets, sparsity=1 - density, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


def lift(model: Any, config: LiftConfig) -> Any:
    """leanlift on every Linear of the blocks, for a loop of one's own over `SparseAdamW`."""
    lifted = get_lift_model(model, config, progress=False)
    claim(lifted)
    return lifted


def shira(model: Any, rank: int) -> Any:
    """PEFT SHiRA with r (m + n) random entries of every Linear of the blocks."""
    from peft import ShiraConfig, get_peft_model

    config = ShiraConfig(
        r=rank, target_modules=_linears(model), task_type="CAUSAL_LM", random_seed=0
    )
    config.mask_fn = _random_mask
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(mark_quantized(model), config)


def _random_mask(base_layer: Any, r: int, **_: Any) -> torch.Tensor:
    """r (m + n) random entries as a 0/1 mask [m, n], drawn where the layer is: PEFT's own takes a
    permutation of all entries on the CPU, ten seconds a matrix."""
    m, n = base_layer.out_features, base_layer.in_features
    scores = torch.rand(m * n, device=base_layer.weight.device)
    mask = torch.zeros_like(scores)
    mask[scores.topk(r * (m + n)).indices] = 1.0
    return mask.view(m, n)


def _linears(model: Any, kind: type[nn.Module] = bnb.nn.Linear4bit) -> list[str]:
    names = (name for name, m in model.named_modules() if isinstance(m, kind))
    return sorted({name.rpartition(".")[2] for name in names} - {"lm_head"})


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained(model))


def stock_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the stock model computes, over all logits."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def tiled_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """leanlift's loss of every next token, as LiftTrainer has it."""
    hidden = base_of(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    head, labels = output_head(model), ids[:, 1:].reshape(-1)
    assert head is not None
    flat = hidden.reshape(-1, hidden.shape[-1])
    return head_loss(flat, labels, head, float(labels.numel())).loss
