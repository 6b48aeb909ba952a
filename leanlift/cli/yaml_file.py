"""A file of settings as YAML: a mapping whose keys stand once."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from leanlift.errors import UserError, first_line


def read_settings(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, no mapping, or a key that stands twice.
    """
    if not path.is_file():
        raise UserError(f"the config file {path} does not exist.")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UserError as error:
        raise UserError(f"in {path}, {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise UserError(f"{path} is not valid YAML: {first_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no mapping: expected lines such as 'learning_rate: 2e-4'.")
    return settings


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: the later one would win without a word."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if isinstance(key, Hashable) and key in seen:
            raise UserError(f"the key {key!r} stands on lines {seen[key]} and {line}: keep one.")
        seen[key] = line
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_implicit_resolver(  # YAML 1.1 takes 1e-5, without a dot, for a text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE]-[0-9]+$"), list("-+0123456789")
)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
