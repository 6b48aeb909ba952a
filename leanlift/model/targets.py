"""Which Linears of a causal language model are trained.

The default is every Linear inside the blocks: found by walking the module lists of the model, so
no model family is named anywhere. What lies outside (embeddings, lm_head) is never a target.
"""

from __future__ import annotations

from torch import nn

from leanlift.config import ALL_LINEAR, TARGET_PRESETS
from leanlift.errors import MaskError, UserError
from leanlift.weights.quantized import is_quantized


def find_targets(model: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """Names of the target modules, in model order.

    Args:
        model: a stock model.
        wanted: "all-linear", "attention", "mlp", or endings of module names.

    Raises:
        UserError: nothing matches, or an ending does not, or the blocks hold weights that leanlift
            cannot train.
    """
    names = dict(model.named_modules())
    inside = inside_blocks(names)
    if wanted in TARGET_PRESETS:
        inside = [name for name in inside if _in_preset(name, wanted)]
        _refuse_untrainable(names, inside)
        found = [name for name in inside if _is_linear(names[name])]
        if not found:
            kind = "Linear" if wanted == ALL_LINEAR else f"Linear of an {wanted} part"
            raise UserError(
                f"found no {kind} inside the blocks of this {type(model).__name__}: leanlift "
                "trains nn.Linear, bnb.nn.Linear4bit and bnb.nn.Linear8bitLt."
            )
        return found
    endings = (wanted,) if isinstance(wanted, str) else wanted
    unmatched = [end for end in endings if not any(_ends_in(name, end) for name in inside)]
    if unmatched or not endings:
        linears = sorted({name.rpartition(".")[2] for name in inside if _is_linear(names[name])})
        raise MaskError(
            f"target_modules={unmatched} matches nothing inside the blocks of this "
            f"{type(model).__name__}: its Linears there are called {linears}."
        )
    return [name for name in inside if any(_ends_in(name, end) for end in endings)]


def _ends_in(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def inside_blocks(names: dict[str, nn.Module]) -> list[str]:
    """The modules inside the blocks of a model, given all of its modules by name."""
    blocks = _block_lists(names)
    return [name for name in names if any(name.startswith(f"{b}.") for b in blocks)]


PRESET_PARTS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "feedforward", "ffn"),
}
"""What the part of a block is called that holds the Linears of a preset."""


def _in_preset(name: str, preset: str | tuple[str, ...]) -> bool:
    if preset == ALL_LINEAR:
        return True
    assert isinstance(preset, str)
    parents = name.lower().split(".")[:-1]
    return any(part in parent for parent in parents for part in PRESET_PARTS[preset])


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_quantized(module)


def block_lists(model: nn.Module) -> list[str]:
    """The outermost module lists of a model: where a transformer keeps its blocks."""
    return _block_lists(dict(model.named_modules()))


def _block_lists(names: dict[str, nn.Module]) -> list[str]:
    lists = [
        name for name, module in names.items() if isinstance(module, nn.ModuleList) and len(module)
    ]
    return [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]


def _refuse_untrainable(names: dict[str, nn.Module], inside: list[str]) -> None:
    """Blocks with other weight matrices than Linears would be trained only in part, silently."""
    for name in inside:
        module = names[name]
        if type(module).__name__ == "Conv1D":
            raise UserError(
                f"{name} is a Conv1D, whose weight is stored transposed; leanlift does not support "
                "it (GPT-2 and its relatives): use a model whose blocks are made of Linears."
            )
        found = None if _is_linear(module) else _unread_matrix(name, module)
        if found is not None:
            raise UserError(
                f"{found}, which leanlift does not train: name the Linears to train with "
                'target_modules, for example ["q_proj", "k_proj", "v_proj", "o_proj"].'
            )


def _unread_matrix(name: str, module: nn.Module) -> str | None:
    """What weights a module of a block has that are no Linear's; None where it has none, is an
    embedding, or a router of experts."""
    if isinstance(module, nn.Embedding) or _is_router(name, module):
        return None
    if all(hasattr(module, side) for side in ("in_features", "out_features")):
        return f"{name} is a {type(module).__name__}, a Linear of a kind"
    for key, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        if isinstance(module, nn.modules.conv._ConvNd) and len(shape) > 2:
            return f"{name} is a convolution with weights {shape}"
        if len(shape) == 3:
            return f"{name}.{key} holds fused expert weights {shape}"
        if len(shape) > 1:
            return f"{name}.{key} of a {type(module).__name__} holds a matrix {shape}"
    packed = [key for key, buffer in module.named_buffers(recurse=False) if key == "qweight"]
    return f"{name} is a {type(module).__name__} with packed weights" if packed else None


def _is_router(name: str, module: nn.Module) -> bool:
    """Whether it chooses experts: those are never trained."""
    kind = type(module).__name__.lower()
    return name.rpartition(".")[2] in ("gate", "router") or "router" in kind
