"""Which Linears of a causal language model are trained.

The default is every Linear inside the blocks: found by walking the module lists of the model, so
no model family is named anywhere. What lies outside (embeddings, lm_head) is never a target.
"""

from __future__ import annotations

from torch import nn

from leanlift import _bnb
from leanlift.config import ALL_LINEAR
from leanlift.errors import UserError


def find_targets(model: nn.Module, wanted: str | tuple[str, ...]) -> list[str]:
    """Names of the target modules, in model order.

    Args:
        model: a stock model.
        wanted: "all-linear", or endings of module names.

    Raises:
        UserError: nothing matches, or the blocks hold weights that leanlift cannot train.
    """
    names = dict(model.named_modules())
    blocks = _block_prefixes(names)
    inside = [name for name in names if any(name.startswith(f"{b}.") for b in blocks)]
    if wanted == ALL_LINEAR:
        _refuse_untrainable(names, inside)
        found = [name for name in inside if _is_linear(names[name])]
        if not found:
            raise UserError(
                f"found no Linear inside the blocks of this {type(model).__name__}: leanlift "
                "trains nn.Linear, bnb.nn.Linear4bit and bnb.nn.Linear8bitLt."
            )
        return found
    endings = (wanted,) if isinstance(wanted, str) else wanted
    found = [
        name for name in inside if any(name == end or name.endswith(f".{end}") for end in endings)
    ]
    if not found:
        linears = sorted({name.rpartition(".")[2] for name in inside if _is_linear(names[name])})
        raise UserError(
            f"target_modules={list(endings)} matches nothing inside the blocks of this "
            f"{type(model).__name__}: its Linears there are called {linears}."
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _bnb.is_linear4bit(module) or _bnb.is_linear8bit(module)


def _block_prefixes(names: dict[str, nn.Module]) -> list[str]:
    """The outermost module lists: where a transformer keeps its blocks."""
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
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                raise UserError(
                    f"{name}.{key} holds fused expert weights {tuple(parameter.shape)}, which "
                    "leanlift does not train: name the Linears to train with target_modules, "
                    'for example ["q_proj", "k_proj", "v_proj", "o_proj"].'
                )
