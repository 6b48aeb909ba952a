"""From an adapter to a GGUF file with a Modelfile beside it, and how much of it came through.

Adapter and base are merged into a temporary directory; llama.cpp's converter makes a 16-bit file
of that, its quantizer the file that was asked for. To see what quantization loses, the base alone
goes the same way, so that both were treated alike. All of it happens in the output's own temporary
directory, which is removed whether it ends well or not: the output is whole or absent.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leanlift.data.tokenizer import end_tokens, load_tokenizer
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import quiet_loading
from leanlift.evaluation.verify import BOUNDS, ask_both
from leanlift.export import MergeReport, check_space
from leanlift.export.card import CARD_NAME
from leanlift.export.directory import carry_over, write_config
from leanlift.export.rows import put_vocabulary
from leanlift.export.tokens import write_tokenizer
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.tensors import new_directory, read_json
from leanlift.requantized.asked import NEW, TOKENS, Asked, ask, asked_of, logits_of, loss_of
from leanlift.requantized.change import change_in_files, types_in
from leanlift.requantized.characters import write_as_pieces
from leanlift.requantized.check import Comparison, compare, same_model
from leanlift.requantized.kinds import CONVERTED, DTYPES
from leanlift.requantized.modelfile import modelfile
from leanlift.requantized.prompts import Template, stops_of, template_for
from leanlift.requantized.runtime import Stock, gguf_runtime_words, open_gguf, quick_dtype
from leanlift.requantized.tools import Tools, find_tools
from leanlift.requantized.wanted import Known, Wanted, known, merge
from leanlift.rows.examples import columns_of
from leanlift.weights.quantized import dtype_of

MODELFILE = "Modelfile"

USE = """## Use

With Ollama: `ollama create {name} -f Modelfile`, then `ollama run {name}`

With llama.cpp: `llama-cli -m {file}`
"""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        output, file: the directory, and the name of the file in it.
        nbytes: of the file.
        types: its matrices, by the type that llama.cpp holds them in.
        made_by: what quantized it, in words.
        template: of the Modelfile.
        merged: the merge that it was made of.
        comparison: what was found of it; None: nothing was compared.
    """

    output: str
    file: str
    nbytes: int
    types: dict[str, int]
    made_by: str
    template: Template
    merged: MergeReport
    comparison: Comparison | None


def write_gguf(
    wanted: Wanted, output: str | Path, kind: str, llama_cpp: str | Path | None = None
) -> Written:
    """Write an adapter and its base as a GGUF file, a Modelfile and a card.

    Args:
        wanted: of which adapter, and how it is merged.
        output: a new directory.
        kind: of the file, a key of `DTYPES` or `FTYPES`; see `kind_of`.
        llama_cpp: a directory of llama.cpp.

    Raises:
        UserError: a tool that is not there, a model or a tokenizer that llama.cpp does not know, no
            room on the disk, whatever `merge_adapter` refuses, or a file that is not what adapter
            and base compute. Nothing is left behind then.
    """
    wanted = replace(wanted, dtype=DTYPES.get(kind, wanted.dtype))
    tools, out = find_tools(kind, llama_cpp), Path(output)
    with known(wanted) as found:
        check_space(out, _room(found, wanted, kind))
        with new_directory(out) as partial:
            making = _Making(found, wanted, tools, kind, partial / "work", out.name)
            making.try_vocabulary()
            written = making.write(partial)
            shutil.rmtree(making.work)
    return replace(written, output=str(out))


def _room(found: Known, wanted: Wanted, kind: str) -> int:
    """Bytes that the output's directory holds at once, at most: a merge and its 16-bit file; where
    a quantized file is compared, also both files of the base, a byte for each weight of the two."""
    sixteen = dtype_of(wanted.dtype).itemsize * found.weights
    if kind in DTYPES or not wanted.verify:
        return 2 * sixteen
    return 3 * sixteen + 2 * found.weights


class _Making:
    """The steps of one export, in its temporary directory."""

    def __init__(
        self, found: Known, wanted: Wanted, tools: Tools, kind: str, work: Path, name: str
    ) -> None:
        self.known, self.wanted, self.tools, self.kind = found, wanted, tools, kind
        self.adapter, self.work, self.name = found.adapter, work, name
        self.plain = next(kind for kind, dtype in DTYPES.items() if dtype == wanted.dtype)
        work.mkdir()

    def try_vocabulary(self) -> None:
        """Ask the converter for the model and its tokenizer alone, before anything is merged."""
        place, source = self.work / "vocabulary", self.known.source
        place.mkdir()
        carry_over(source, place)
        write_tokenizer(source, self.adapter.directory, place, None)
        config = read_json(source / "config.json")
        if self.adapter.grown is not None:  # the merge has more rows than the base
            put_vocabulary(self.adapter.grown.rows, config)
        write_config(config, place, self.wanted.dtype)
        write_as_pieces(place)
        self.tools.try_vocabulary(place, self.work / "vocabulary.gguf")
        shutil.rmtree(place)
        (self.work / "vocabulary.gguf").unlink(missing_ok=True)

    def write(self, partial: Path) -> Written:
        """Merge, convert, quantize, compare; puts file, Modelfile and card into `partial`."""
        merged = merge(self.wanted, self.work / self.name)
        place, rows = Path(merged.output), self.known.rows
        tokenizer = load_tokenizer(str(place))
        asked = asked_of(rows, place) if rows is not None and self.wanted.verify else None
        template = template_for(tokenizer, () if rows is None else columns_of(rows.rows))
        stops = stops_of(tokenizer, end_tokens(str(place)) or [tokenizer.eos_token_id], template)
        file = f"{re.sub(r'[^A-Za-z0-9._-]', '-', self.name)}-{self.kind}.gguf"
        text = modelfile(file, template.text, stops, _generation(place))
        card = (place / CARD_NAME).read_text(encoding="utf-8")
        sixteen = self._convert(merged)
        made = partial / file
        if self.kind == self.plain:
            sixteen = sixteen.rename(made)
        else:
            self._quantize(sixteen, made)
        with quiet_loading():
            found = None if asked is None else self._compare(asked, merged, sixteen, made)
        (partial / MODELFILE).write_text(text, encoding="utf-8")
        (partial / CARD_NAME).write_text(self._card(card, file, found), encoding="utf-8")
        by = self.tools.quantizer_words
        return Written("", file, made.stat().st_size, types_in(made), by, template, merged, found)

    def _convert(self, merged: MergeReport) -> Path:
        """The 16-bit file of a merge, which is removed."""
        place = Path(merged.output)
        write_as_pieces(place)
        file = self.work / f"{place.name}.gguf"
        self.tools.convert(place, file, self.plain)
        if self.kind == CONVERTED:
            self.tools.convert(place, _converted(file), CONVERTED)
        shutil.rmtree(place)
        return file

    def _quantize(self, sixteen: Path, file: Path) -> None:
        if self.kind == CONVERTED:
            _converted(sixteen).rename(file)
        else:
            self.tools.quantize(sixteen, file, self.kind)

    def _compare(self, asked: Asked, merged: MergeReport, sixteen: Path, made: Path) -> Comparison:
        """The file against adapter and base, and the base's file against both.

        Raises:
            UserError: the 16-bit file is another model.
        """
        most = TOKENS + NEW
        quick = replace(merged, dtype=quick_dtype(merged.dtype))
        before, after = ask_both(self.adapter, quick, lambda model: ask(Stock(model), asked))
        computed = {merged.dtype, "float16"}  # which llama.cpp rounds activations to
        computed |= {self.adapter.base.dtype} if merged.onto == "quantized" else set()
        coarsest = max(computed, key=lambda dtype: BOUNDS[dtype])
        with open_gguf(sixteen, most) as model:
            found = logits_of(model, asked)
            same = same_model(model, asked, found, before, after, coarsest)
        with open_gguf(made, most) as model:
            written = ask(model, asked)
        base_loss = change = None
        if sixteen != made:
            base = self._convert(merge(self.wanted, self.work / "base", bare=True))
            base_made = self.work / f"base-{self.kind}.gguf"
            self._quantize(base, base_made)
            with open_gguf(base_made, most) as model:
                base_loss = loss_of(model, asked)
            change = change_in_files(base, sixteen, base_made, made)
        losses = (before, after, written)
        runtime, kind = gguf_runtime_words(), self.kind
        return compare(runtime, kind, asked, same, losses, base_loss, change)

    def _card(self, merged: str, file: str, found: Comparison | None) -> str:
        """The card of the merge, but for how it is used, and what was found."""
        about = merged.partition("## Use")[0]
        about = about.replace("library_name: transformers", "library_name: gguf", 1)
        lines: Sequence[str] = [] if found is None else ["## Compared", "", "```"]
        lines = [*lines, *([] if found is None else [*found.lines(), "```", ""])]
        return about + "\n".join([*lines, USE.format(name=self.name, file=file)])


def _converted(sixteen: Path) -> Path:
    return sixteen.with_suffix(f".{CONVERTED}.gguf")


def _generation(place: Path) -> dict[str, Any]:
    """A checkpoint's generation_config.json; an empty one where there is none to read."""
    with suppress(UserError):
        data = read_json(place / "generation_config.json", MOST_OF_A_STRANGER)
        return data if isinstance(data, dict) else {}
    return {}
