"""The base model, loaded by stock transformers, and read whole or not at all.

transformers reports in a table what it did not find in a checkpoint, and goes on over weights that
it has just initialized. A run over those trains, saves and merges, and means nothing. Here a
checkpoint that was not read whole is refused, and so is, before any weight is read, one in a
quantized form that is not bitsandbytes' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

from leanlift.defaults import default_dtype
from leanlift.errors import UserError, first_line
from leanlift.io.hub import cached_commit, check_name
from leanlift.io.places import base_directory
from leanlift.measure import is_out_of_memory
from leanlift.methods import REWARD_HEAD
from leanlift.plan.auto import auto_class, auto_class_with, parts_left_out
from leanlift.source import open_checkpoint, stored_quantization
from leanlift.training.arguments import RunArguments
from leanlift.training.experts import load_in_few_bits, load_with_experts_as_stored
from leanlift.training.on_the_host import quantizing_on
from leanlift.weights.quantized import (
    dtype_name,
    dtype_of,
    frozen_weight,
    is_quantized,
)
from leanlift.weights.stored import requested_format


def load_model(
    args: RunArguments,
    device: torch.device,
    trust_remote_code: bool = False,
    experts_too: bool = True,
    images: bool = False,
    modules: Iterable[str] | None = None,
) -> Any:
    """The base model, quantized as asked for, or as its checkpoint is.

    Args:
        args: of the run.
        device: where it goes; a base that is streamed (`stream_base`) stays on the host.
        trust_remote_code: as in `from_pretrained`.
        experts_too: whether its experts are quantized likewise.
        images: whether rows have some: see `auto_class`.
        modules: names that the model has, where they are known: see `auto_class_with`.

    Raises:
        UserError: missing, half-downloaded or damaged checkpoint, one of another architecture than
            its configuration says, an unknown model type, a quantized form that is not read, or
            contradictory settings.
    """
    name = args.model_name_or_path
    check_base_place(args)
    dtype = dtype_of(args.dtype or default_dtype(device.type == "cuda"))
    try:
        config = AutoConfig.from_pretrained(
            name, revision=args.model_revision, trust_remote_code=trust_remote_code
        )
        own = stored_quantization(config, name)
        if own is not None:
            _check_request(args, own)
            _check_merge(args)
        load = load_in_few_bits if experts_too else load_with_experts_as_stored
        with quantizing_on(device) if args.stream_base else nullcontext():
            model, found = load(
                _class_of(args, config, images, modules),
                name,
                revision=args.model_revision,
                dtype=dtype,
                device_map=_place(args, device),
                attn_implementation=args.attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **_further(args, None if own is not None else quantization(args, dtype)),
            )
    except Exception as error:  # each config class and quantizer has its own ways to refuse
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"the base {name} cannot be loaded: {first_line(error)}") from error
    found = {**found, "mismatched_keys": _other_shapes(model, found)}
    found = _with_a_new_head(found) if args.method == "reward" else found
    check_read_whole(_of_what_is_loaded(found, config, name, model), name)
    for path, module in model.named_modules():
        if is_quantized(module):
            frozen_weight(module, path)  # has the shape that it should have, and can be read
    model.config._commit_hash = cached_commit(name, args.model_revision)
    return model


def _place(args: RunArguments, device: torch.device) -> dict[str, Any] | None:
    """Where transformers puts a base."""
    if device.type != "cuda":
        return None
    return {"": "cpu" if args.stream_base else device.index or 0}


def _further(args: RunArguments, asked: Any) -> dict[str, Any]:
    """What else `from_pretrained` is given; a quantization of None would erase the checkpoint's."""
    more = {} if asked is None else {"quantization_config": asked}
    return {**more, "num_labels": 1} if args.method == "reward" else more


def _class_of(args: RunArguments, config: Any, images: bool, modules: Iterable[str] | None) -> Any:
    """The Auto class to load a base by; see `load_model`."""
    if args.method == "reward":
        return AutoModelForSequenceClassification
    if modules is None:
        return auto_class(config, args.model_name_or_path, images)
    return auto_class_with(config, args.model_name_or_path, modules)


def _with_a_new_head(found: dict[str, Any]) -> dict[str, Any]:
    """Loading info of a reward model, which begins with a head of its own in the place of that over
    the vocabulary."""
    new, old = f"{REWARD_HEAD}.weight", "lm_head.weight"
    missing, left = found.get("missing_keys", ()), found.get("unexpected_keys", ())
    return {
        **found,
        "missing_keys": [key for key in missing if key != new],
        "unexpected_keys": [key for key in left if key != old],
    }


def check_loads(directory: Path) -> None:
    """Whether stock transformers would read a 16-bit checkpoint whole, from its headers alone:
    what is merged onto it would be read as it is.

    A model whose code comes with its checkpoint is not looked at, since that would run it.

    Raises:
        UserError: it would not.
    """
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if "auto_map" in config.to_dict():
            return
        model, found = auto_class(config, str(directory)).from_pretrained(
            directory,
            config=config,
            device_map="meta",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the base {directory} cannot be loaded: {first_line(error)}") from error
    check_read_whole(_of_what_is_loaded(found, config, str(directory), model), str(directory))


def check_base_place(args: RunArguments) -> None:
    """Refuse what is neither a whole checkpoint directory nor possibly a name on the hub.

    Raises:
        UserError: it is neither; says what is missing.
    """
    path = base_directory(args.model_name_or_path, args.model_revision)
    if path is None:
        check_name(args.model_name_or_path, "the base", "--model_revision")
        return
    with open_checkpoint(path):  # headers only: finds missing and cut-off shards
        pass


def _check_request(args: RunArguments, own: dict[str, Any]) -> None:
    """Refuse to take a 4-bit checkpoint for an INT8 one; 4 bits are the default, which says
    nothing about what was meant."""
    if args.load_in_8bit and not own.get("load_in_8bit"):
        raise UserError(
            f"load_in_8bit was asked for, but {args.model_name_or_path} is quantized to 4 bits on "
            "disk: leave load_in_8bit out, or name the 16-bit checkpoint it was made from."
        )


def _check_merge(args: RunArguments) -> None:
    """A merge onto 16-bit weights that are not there is found before training."""
    if args.merged_dir and args.merge_onto == "original":
        raise UserError(
            f"{args.model_name_or_path} is quantized on disk and has no 16-bit weights to merge "
            "onto: set merge_onto to quantized, or leave merged_dir out and name the 16-bit "
            "checkpoint at the export."
        )


def _other_shapes(model: Any, found: dict[str, Any]) -> set[Any]:
    """(name, stored, expected) of what has another shape than it should; older transformers take
    an embedding of any size into a quantized model without a word."""
    mismatched = set(found.get("mismatched_keys", ()))
    embedding = model.get_input_embeddings()
    weight, expected = (
        getattr(embedding, "weight", None),
        getattr(embedding, "num_embeddings", None),
    )
    if isinstance(weight, torch.Tensor) and expected not in (None, weight.shape[0]):
        name = next(n for n, parameter in model.named_parameters() if parameter is weight)
        mismatched.add((name, weight.shape, (expected, *weight.shape[1:])))
    return mismatched


def _of_what_is_loaded(found: dict[str, Any], config: Any, name: str, model: Any) -> dict[str, Any]:
    """Loading info without the tensors of parts that a text part alone has no place for."""
    unexpected = found.get("unexpected_keys", ())
    if not unexpected:
        return found
    left_out = parts_left_out(config, name, model)
    left = [key for key in unexpected if left_out.isdisjoint(str(key).split("."))]
    return {**found, "unexpected_keys": left}


def check_read_whole(found: dict[str, Any], name: str) -> None:
    """Refuse a model whose weights are not those of its checkpoint, and all of them.

    Args:
        found: transformers' loading info.
        name: of the base.

    Raises:
        UserError: tensors missing, left over, of another shape, or not converted.
    """
    mismatched = [
        f"{key[0]} (stored {tuple(key[1])}, expected {tuple(key[2])})"
        for key in found.get("mismatched_keys", ())
    ]
    for what, keys in (
        ("has other shapes than its config.json says", mismatched),
        ("lacks", found.get("missing_keys", ())),
        ("holds what its architecture has no place for", found.get("unexpected_keys", ())),
        ("could not be converted", found.get("error_msgs", ())),
    ):
        if keys:
            raise UserError(
                f"the base {name} was not read whole: it {what}: {_some(keys)}. Expected a "
                "language model's checkpoint that belongs to its config.json; fetch it again, or "
                "name another one."
            )


def _some(keys: Iterable[Any]) -> str:
    """The first names, and how many more there are."""
    names = sorted(map(str, keys))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:120] for name in names[:3]) + more


def quantization(args: RunArguments, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration that the arguments ask for."""
    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not args.load_in_4bit:
        return None
    kind, double = args.bnb_4bit_quant_type, args.bnb_4bit_use_double_quant
    fmt = requested_format(True, False, kind, double, dtype_name(dtype))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt.kind,
        bnb_4bit_use_double_quant=fmt.double,
        bnb_4bit_compute_dtype=dtype,
    )
