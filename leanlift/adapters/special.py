"""The special tokens that a model was trained with: which ids end, begin and pad a text.

A run may train another end token than its base had. Tools read it in three places: the
tokenizer's files, config.json, and generation_config.json, whose list of end tokens is what
`generate` stops at. An adapter keeps what the live model says in the latter two, and loading and
merging give it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanlift.errors import UserError

LARGEST_ID = 2**31 - 1
MOST_ENDS = 256


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens.

    Attributes:
        eos: what ends a text, as the configuration has it; the first is the one that is trained.
        bos, pad: None where there is none.
        stops: all that generation stops at.
    """

    eos: tuple[int, ...] = ()
    bos: int | None = None
    pad: int | None = None
    stops: tuple[int, ...] = ()

    @property
    def largest(self) -> int:
        """-1 where there is none."""
        return max((*self.eos, *self.stops, self.bos or 0, self.pad or 0), default=-1)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"eos": list(self.eos), "bos": self.bos, "pad": self.pad, "stops": list(self.stops)}

    @classmethod
    def from_dict(cls, data: Any) -> SpecialTokens:
        """Back from `to_dict`; `data` may come from a file that anyone has written.

        Raises:
            UserError: a value that no special tokens have.
        """
        known = isinstance(data, dict) and set(data) == {"eos", "bos", "pad", "stops"}
        lists = known and all(isinstance(data[key], list) for key in ("eos", "stops"))
        single = lists and all(data[key] is None or _is_id(data[key]) for key in ("bos", "pad"))
        if not single or not all(
            len(data[key]) <= MOST_ENDS and all(map(_is_id, data[key])) for key in ("eos", "stops")
        ):
            raise UserError(f"expected ids of special tokens, got {data!r:.80}.")
        return cls(tuple(data["eos"]), data["bos"], data["pad"], tuple(data["stops"]))

    @classmethod
    def of(cls, config: Any, generation: Any) -> SpecialTokens:
        """What the two configurations of a live model say; either may be None."""

        def one(name: str) -> int | None:
            found = [i for c in (config, generation) for i in as_ids(getattr(c, name, None))]
            return found[0] if found else None

        eos = as_ids(getattr(config, "eos_token_id", None))
        stops = as_ids(getattr(generation, "eos_token_id", None))
        return cls(eos or stops, one("bos_token_id"), one("pad_token_id"), stops or eos)

    def put(self, config: Any, generation: Any) -> None:
        """Let the configurations of a live model say so; what they stopped at stays."""
        eos: Any = self.eos[0] if len(self.eos) == 1 else list(self.eos)
        for holder in (config, generation):
            for name, value in (("bos_token_id", self.bos), ("pad_token_id", self.pad)):
                if holder is not None and value is not None:
                    setattr(holder, name, value)
        if config is not None and self.eos:
            config.eos_token_id = eos
        if generation is not None and self.eos:
            ends = union(self.eos, self.stops, as_ids(getattr(generation, "eos_token_id", None)))
            generation.eos_token_id = ends[0] if len(ends) == 1 else list(ends)


def union(*ids: tuple[int, ...]) -> tuple[int, ...]:
    """All ids, each once, in order."""
    return tuple(dict.fromkeys(i for part in ids for i in part))


def as_ids(value: Any) -> tuple[int, ...]:
    """Ids from what a configuration may hold: an id, several, or something else, which is none."""
    if _is_id(value):
        return (value,)
    if isinstance(value, (list, tuple)) and len(value) <= MOST_ENDS and all(map(_is_id, value)):
        return tuple(value)
    return ()


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_ID
