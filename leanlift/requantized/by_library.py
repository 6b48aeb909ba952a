"""llama.cpp's quantizer, called in the library of llama-cpp-python; run as a process of its own.

python -m leanlift.requantized.by_library SOURCE TARGET KIND
"""

from __future__ import annotations

import ctypes
import sys
from importlib import import_module

from leanlift.requantized.kinds import FTYPES


def quantize(source: str, target: str, kind: str) -> int:
    """Quantize a GGUF file with all threads; 0 where it is whole."""
    library = import_module("llama_cpp.llama_cpp")
    params = library.llama_model_quantize_default_params()
    params.ftype = FTYPES[kind]
    library.llama_backend_init()
    return int(library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(quantize(*sys.argv[1:4]))
