"""Which Linears of a causal language model are trained, and which stacks of experts.

The default is every one of them inside the blocks but for routers: found by walking the module
lists of the model, so no model family is named anywhere. What lies outside (embeddings, lm_head) is
never a target; blocks that text does not go through (`blocks`) are one only where they are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from leanlift.config import ALL_LINEAR, TARGET_PRESETS
from leanlift.errors import MaskError, UserError
from leanlift.layers import FrozenExperts
from leanlift.model.blocks import inside_blocks, inside_language, other_towers, towers_lines
from leanlift.model.presets import in_preset
from leanlift.model.reading import read_by_parent
from leanlift.model.stacks import named_parts
from leanlift.weights.kinds import is_dense_linear, matrix_of
from leanlift.weights.quantized import is_quantized
from leanlift.weights.stacks import ExpertStack

LEAST_SHARE = 0.5
"""Of the weights in the blocks that a preset covers: where less is in Linears, most of the model
would stay untrained, and the preset is refused."""

MOST_NAMED = 6

ROUTERS = ("gate", "router")
"""What chooses experts is called so."""


Selects = Callable[[tuple[int, int], str], bool]
"""Whether the budget selects entries of a matrix, by its shape and name."""


def find_targets(
    model: nn.Module,
    wanted: str | tuple[str, ...],
    excluded: str | tuple[str, ...] = (),
    selects: Selects = lambda shape, name: True,
) -> list[str]:
    """Names of the target modules, in model order.

    Args:
        model: a stock model.
        wanted: "all-linear", "attention", "mlp", or endings of module names: in the language model
            where they are there, else in a part that text does not reach.
        excluded: endings of names of what is not trained all the same.
        selects: a preset passes over what it says no of, as long as anything is left; what is
            named is not passed over.

    Raises:
        UserError: nothing matches, or an ending does not, or something is named that is no matrix,
            or the blocks hold weights that leanlift cannot train.
    """
    names = named_parts(model)
    everything = inside_blocks(names)
    inside = _without(everything, excluded, type(model).__name__)
    language = inside_language(names)
    if wanted in TARGET_PRESETS:
        inside = [name for name in inside if name in language]
        found = _of_preset(names, inside, str(wanted), type(model).__name__)
        return [name for name in found if selects(_shape(names[name]), name)] or found
    endings = (wanted,) if isinstance(wanted, str) else wanted
    unmatched = [end for end in endings if not any(ends_in(name, end) for name in everything)]
    if unmatched or not endings:
        linears = sorted(
            {name.rpartition(".")[2] for name in everything if _is_linear(names[name])}
        )
        raise MaskError(
            f"target_modules={unmatched} matches nothing inside the blocks of this "
            f"{type(model).__name__}: its Linears there are called {linears}."
        )
    own = [end for end in endings if any(ends_in(name, end) for name in language)]
    found = [
        name
        for name in inside
        if any(ends_in(name, end) and (name in language or end not in own) for end in endings)
    ]
    if not found:
        raise MaskError("exclude_modules leaves nothing of target_modules: name less, or more.")
    for name in found:
        _refuse_no_matrix(names, name)
        if read_by_parent(names, name):
            parent = type(names[name.rpartition(".")[0]]).__name__
            raise UserError(
                f"the weight of {name} is read by {parent} itself, past any layer in its place: "
                "offsets would be trained nowhere. Leave it out of target_modules."
            )
    return found


def _of_preset(names: dict[str, nn.Module], inside: list[str], preset: str, kind: str) -> list[str]:
    """The targets of a preset among the modules inside the blocks of a model of this kind.

    Raises:
        UserError: none, or too little of what the preset covers.
    """
    inside = [name for name in inside if in_preset(names, name, preset)]
    _refuse_packed(names, inside)
    found = [
        name
        for name in inside
        if _is_linear(names[name]) and not read_by_parent(names, name) and not _routes(names, name)
    ]
    _refuse_untrainable(names, inside, found)
    if not found:
        part = "Linear" if preset == ALL_LINEAR else f"Linear of an {preset} part"
        raise UserError(
            f"found no {part} inside the blocks of this {kind}: leanlift trains nn.Linear, "
            "bnb.nn.Linear4bit and bnb.nn.Linear8bitLt."
        )
    return found


def ends_in(name: str, ending: str) -> bool:
    """Whether a module's name ends as `ending` says, at a dot."""
    return name == ending or name.endswith(f".{ending}")


def _without(inside: list[str], excluded: str | tuple[str, ...], kind: str) -> list[str]:
    """The modules inside the blocks but for those that are excluded.

    Raises:
        UserError: an ending that none of them has.
    """
    endings = (excluded,) if isinstance(excluded, str) else excluded
    unmatched = [end for end in endings if not any(_is_under(name, end) for name in inside)]
    if unmatched:
        raise MaskError(
            f"exclude_modules={unmatched} matches nothing inside the blocks of this {kind}: leave "
            "it out, or see how its modules are called."
        )
    return [name for name in inside if not any(_is_under(name, end) for end in endings)]


def _is_under(name: str, ending: str) -> bool:
    """Whether a module, or one that it is in, has a name that ends so."""
    parts = name.split(".")
    return any(ends_in(".".join(parts[:depth]), ending) for depth in range(1, len(parts) + 1))


def _refuse_packed(names: dict[str, nn.Module], inside: list[str]) -> None:
    """Refuse weights that another library has packed, which are in no parameter."""
    for name in inside:
        if any(key == "qweight" for key, _ in names[name].named_buffers(recurse=False)):
            raise UserError(
                f"{name} is a {type(names[name]).__name__} with packed weights, which leanlift "
                "cannot read: load the 16-bit checkpoint, quantized by bitsandbytes."
            )


def _refuse_no_matrix(names: dict[str, nn.Module], name: str) -> None:
    """Refuse what is named and is neither a Linear nor a stack of experts.

    Raises:
        MaskError: says what it is, and what in it can be named.
    """
    if _is_linear(names[name]):
        return
    _refuse_packed(names, [name])
    inside = (each for each, part in names.items() if _is_linear(part))
    parts = sorted({_leaf(e) for e in inside if e.startswith(f"{name}.")} - {_leaf(name)})
    how = f"name what is in it ({', '.join(parts)})" if parts else "leave it out"
    raise MaskError(
        f"target_modules names {name}, a {type(names[name]).__name__}: leanlift trains Linears and "
        f"stacks of experts alone; {how}."
    )


def _is_linear(module: nn.Module) -> bool:
    stack = isinstance(module, ExpertStack | FrozenExperts)
    return stack or is_dense_linear(module) or is_quantized(module)


def _refuse_untrainable(names: dict[str, nn.Module], inside: list[str], found: list[str]) -> None:
    """Refuse to train blocks whose weights are for the most part in something else than Linears.

    Raises:
        UserError: says in what, and how to train the Linears all the same.
    """
    left = untrained(names, inside, found)
    share = trained_share(names, found, left)
    if share >= LEAST_SHARE or not left:
        return
    largest = max(left, key=lambda part: part.weights)
    linears = sorted({name.rpartition(".")[2] for name in found})
    how = f"train its Linears alone with target_modules={linears}" if linears else "take another"
    raise UserError(
        f"only {share:.0%} of the weights in these blocks are in Linears, and leanlift trains no "
        f"others: {largest.name} {largest.what}. Name what to train ({how})."
    )


@dataclass(frozen=True)
class Untrained:
    """A matrix inside the blocks that is not trained.

    Attributes:
        name: of its module, or of the parameter.
        what: it is, in words that follow the name.
        kind: what there may be many of, for a table: "conv1d (Conv1d)".
        weights: how many.
    """

    name: str
    what: str
    kind: str
    weights: int


def untrained(names: dict[str, nn.Module], inside: list[str], found: list[str]) -> list[Untrained]:
    """The matrices inside the blocks that are no targets, but for embeddings and routers."""
    targets = set(found)
    left = []
    for name in inside:
        module = names[name]
        if name in targets or isinstance(module, nn.Embedding) or _routes(names, name):
            continue
        if _is_linear(module):
            read = read_by_parent(names, name)
            why = "has a weight that others read" if read else "is too small for the budget"
            left.append(_untrained(name, "weight", module, why))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            what = _what(key, module, tuple(parameter.shape))
            if what is not None and f"{name}.{key}" not in names:  # a stack is a part of its own
                left.append(_untrained(name, key, module, what))
    return left


def trained_share(
    names: dict[str, nn.Module], found: list[str], left: Sequence[Untrained]
) -> float:
    """Which share of the matrices' weights is in the targets."""
    trained = sum(_weights(names[name]) for name in found)
    rest = sum(part.weights for part in left)
    return trained / (trained + rest) if trained + rest else 0.0


def _weights(module: Any) -> int:
    m, n = _shape(module)
    return m * n


def _shape(module: Any) -> tuple[int, int]:
    """Rows and columns of a matrix, quantized or not; of a stack, of each expert's."""
    if isinstance(module, FrozenExperts):
        return module.matrix_shape
    if isinstance(module, ExpertStack):
        m, n = module.weight.shape[-2:]
        return m, n
    sides = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return sides if None not in sides else tuple(matrix_of(module).shape)  # type: ignore[return-value]


def _untrained(name: str, key: str, module: nn.Module, what: str) -> Untrained:
    leaf, kind = _leaf(name), type(module).__name__
    parameter = dict(module.named_parameters(recurse=False))[key]
    weights = _weights(module) if is_quantized(module) else parameter.numel()
    full = name if key == "weight" else f"{name}.{key}"
    return Untrained(
        full, what, f"{leaf if key == 'weight' else f'{leaf}.{key}'} ({kind})", weights
    )


def what_is_left(
    model: nn.Module,
    found: list[str],
    wanted: str | tuple[str, ...],
    excluded: str | tuple[str, ...] = (),
) -> str | None:
    """What a preset trains inside the blocks and what it leaves, as a table; of what is named, what
    text does not reach; None: there is nothing to say. The arguments are those of `find_targets`,
    and `found` is what that gave."""
    names = named_parts(model)
    language = inside_language(names)
    if wanted not in TARGET_PRESETS:
        return beyond_text(model, found)
    inside = [name for name in _without(inside_blocks(names), excluded, "")
              if name in language and in_preset(names, name, str(wanted))]  # fmt: skip
    left, towers = untrained(names, inside, found), other_towers(names)
    if not left and not towers:
        return None
    kinds: dict[str, tuple[int, str]] = {}
    for part in left:
        kinds[part.kind] = kinds.get(part.kind, (0, ""))[0] + part.weights, part.what
    share, rest = trained_share(names, found, left), sum(part.weights for part in left)
    frozen = sorted(kinds.items(), key=lambda item: -item[1][0])
    trained = dict.fromkeys(_leaf(name) for name in found)
    rows = [(share, f"trained  {', '.join(trained)}")]
    rows += [
        ((1 - share) * weights / rest, f"frozen   {kind} {what}")
        for kind, (weights, what) in frozen[:MOST_NAMED]
    ]
    if frozen[MOST_NAMED:]:
        weights = sum(count for _, (count, _) in frozen[MOST_NAMED:])
        rows.append(((1 - share) * weights / rest, "frozen   others"))
    lines = [f"  {part:6.1%}  {text}" for part, text in rows]
    return "\n".join(
        ["Of the weights in the matrices of the blocks:", *lines, *towers_lines(towers)]
    )


def beyond_text(model: nn.Module, found: Iterable[str]) -> str | None:
    """What is said of trained matrices that text does not reach; None: there is none."""
    language = inside_language(named_parts(model))
    beyond = [name for name in found if name not in language]
    if not beyond:
        return None
    return (
        f"Rows of text give {len(beyond)} of the matrices named no gradient, such as "
        f"{beyond[0]}: they are in a part that text does not reach."
    )


def _leaf(name: str) -> str:
    """The last part of a name that is no number."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _what(key: str, module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """What a parameter of a module that is no Linear is; None: no matrix."""
    if key == "weight" and all(hasattr(module, side) for side in ("in_features", "out_features")):
        return f"is a {type(module).__name__}, a Linear of a kind"
    if len(shape) < 2:
        return None
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"is a convolution with weights {shape}"
    if len(shape) == 3 and "expert" in type(module).__name__.lower():
        return f"holds fused expert weights {shape}"
    return f"holds {'a matrix' if len(shape) == 2 else 'weights'} {shape} of its own"


def _routes(names: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a module chooses among experts, or is a part of what does: it is trained only if it
    is named."""
    parts = name.split(".")
    paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return any(
        "router" in type(names[path]).__name__.lower()
        or (path.rpartition(".")[2] in ROUTERS and f"{path.rpartition('.')[0]}.experts" in names)
        for path in paths
    )
