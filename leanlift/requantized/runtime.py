"""Models that answer, whatever runs them: logits of a text, and the likeliest tokens after it.

A checkpoint answers through transformers. A GGUF file answers through llama.cpp where
llama-cpp-python is installed, which is what its users run; else through transformers, which
dequantizes it: the same weights, but not llama.cpp's arithmetic, which rounds activations too.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig

from leanlift.errors import UserError, first_line
from leanlift.evaluation.answers import greedily
from leanlift.requantized.tools import has_runtime


class Runtime(Protocol):
    """Something that answers."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """fp32 logits [T, V] of a text of T tokens, on the CPU."""

    def greedy(self, ids: Sequence[int], most: int, ends: Collection[int]) -> list[int]:
        """The likeliest tokens after a text, one by one, up to an end or to `most`."""

    def tokenize(self, text: str) -> list[int] | None:
        """The runtime's own tokens of a text, special ones read and none added; None: it has no
        tokenizer of its own."""


class Stock:
    """A model of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        return self.model(input_ids=self._batch(ids)).logits[0].float().cpu()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], most: int, ends: Collection[int]) -> list[int]:
        given, pad = self._batch(ids), min(ends)
        with greedily(self.model, sorted(ends), pad, most) as config:
            out = self.model.generate(
                given, attention_mask=torch.ones_like(given), generation_config=config
            )
        return list(takewhile(lambda token: token not in ends, out[0, len(ids) :].tolist()))

    def tokenize(self, text: str) -> list[int] | None:
        return None

    def _batch(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=next(self.model.parameters()).device)


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU.

    Args:
        file: the file.
        most: tokens of the longest text with its answer.

    Raises:
        UserError: llama.cpp cannot load it.
    """

    def __init__(self, file: Path, most: int) -> None:
        llama = import_module("llama_cpp.llama").Llama
        try:
            self.model = llama(
                model_path=str(file),
                n_ctx=most,
                n_batch=most,
                n_gpu_layers=0,
                n_threads=os.cpu_count(),
                logits_all=True,
                verbose=False,
            )
        except (ValueError, OSError, AssertionError) as error:
            raise UserError(f"llama.cpp cannot load {file.name}: {first_line(error)}") from error

    def logits(self, ids: Sequence[int]) -> Tensor:
        self.model.reset()
        self.model.eval(list(ids))
        return torch.from_numpy(self.model.scores[: len(ids)].copy())

    def greedy(self, ids: Sequence[int], most: int, ends: Collection[int]) -> list[int]:
        found: list[int] = []
        self.model.reset()
        self.model.eval(list(ids))
        while len(found) < most:
            token = int(self.model.scores[self.model.n_tokens - 1].argmax())
            if token in ends:
                break
            found.append(token)
            self.model.eval([token])
        return found

    def tokenize(self, text: str) -> list[int] | None:
        found: list[int] = self.model.tokenize(text.encode(), add_bos=False, special=True)
        return found


def quick_dtype(dtype: str) -> str:
    """In which a 16-bit model answers: CPUs multiply in fp16 many times slower than in fp32, which
    takes twice the memory and rounds less."""
    return dtype if torch.cuda.is_available() else "float32"


def gguf_runtime_words() -> str:
    """What answers for a GGUF file here, in a sentence."""
    return "llama.cpp" if has_runtime() else "transformers, which dequantizes it,"


@contextmanager
def open_gguf(file: Path, most: int) -> Iterator[Runtime]:
    """A GGUF file that answers; see `gguf_runtime_words` for what runs it.

    Args:
        file: the file.
        most: tokens of the longest text with its answer.

    Raises:
        UserError: it cannot be loaded.
    """
    if has_runtime():
        opened = LlamaCpp(file, most)
        try:
            yield opened
        finally:
            opened.model.close()
        return
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except (ValueError, OSError, KeyError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"transformers cannot load {file.name} ({first_line(error).rstrip('.')}): install "
            "llama-cpp-python to have it checked, or leave the check out with --no_verify."
        ) from error
    yield Stock(model)
