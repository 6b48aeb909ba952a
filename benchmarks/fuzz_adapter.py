"""Damage valid adapters at random, and see what becomes of them.

    python -m benchmarks.fuzz_adapter [--count 5000] [--seed 0] [--only NUMBER]

An adapter is a file from the internet. Three valid ones (leanlift's own form, PEFT's SHiRA with
leanlift.json and without) of a tiny NF4 model are mutated: values, types and keys of the
configuration, header and bytes of the tensor file, lengths, truncations, splices, and well-formed
files with wrong content. Each is read; every fifth is also loaded onto a live model, stock and
attached in turn, and every tenth merged.

Claim: each outcome is a `UserError`, or a load whose content passes a check of its own: positions
sorted, distinct and inside the matrix, active and retired ones disjoint, finite offsets, counts
that agree, and the same dense matrix as a plain reading of the file gives. After a refusal the
live model computes the same bits as before, no output directory exists, and nothing was written
or executed anywhere. A case that asks for more than 2 GiB, or for more than 20 s, counts as failed.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import copy
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.adapter_content import InvalidContentError, check_layer, plain_reading
from benchmarks.adapter_mutations import MUTATIONS, WEIGHTS, Files
from benchmarks.common import write_rows
from leanlift import (
    LiftConfig,
    UserError,
    get_lift_model,
    load_adapter,
    merge_adapter,
    refresh_mask,
    save_adapter,
)
from leanlift.adapters import open_adapter, plan_shira, write_shira
from leanlift.model import lift_layers, lifted

MEMORY = 2 * 2**30
SECONDS = 20
LIVE_EVERY, MERGE_EVERY = 5, 10
OUTCOMES = ("loaded", "refused", "failed")


def make_base(path: Path) -> Path:
    """One block, ragged sizes; down_proj is 300 wide: two segments of the index, one narrow."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=300,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(base: Path) -> Any:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.float32
    ).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(torch.arange(16).reshape(2, 8)).logits
    return result


def state(model: Any) -> dict[str, Any]:
    """Everything a model consists of: modules by name and type, and tensors.

    A stock NF4 model cannot be asked for its logits here: bitsandbytes' CPU forward wants widths
    that are multiples of 64, and repacks the weights.
    """
    model = lifted(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    return {"kinds": kinds, "trained": trained, **model.state_dict()}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def files_of(directory: Path) -> Files:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def valid_adapters(base: Path, work: Path) -> dict[str, Files]:
    """The three forms of one adapter, some of whose entries are retired."""
    model = get_lift_model(load(base), LiftConfig(density=0.08, approx_rank=4), progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    refresh_mask(model)
    save_adapter(model, work / "own")
    peft = work / "peft"
    peft.mkdir()
    with open_adapter(work / "own") as adapter:
        write_shira(peft, adapter, plan_shira(adapter), lambda modules: modules)
    forms = {"leanlift": files_of(work / "own"), "PEFT": files_of(peft)}
    forms["PEFT alone"] = {k: v for k, v in forms["PEFT"].items() if k != "leanlift.json"}
    return forms


class Bench:
    """A base, live models over it, and a directory that nothing may write outside of."""

    def __init__(self, work: Path) -> None:
        self.root = work
        self.base = make_base(work / "base")
        self.forms = valid_adapters(self.base, work)
        self.adapter, self.valid, self.output = work / "adapter", work / "own", work / "merged"
        self.stock = load(self.base)
        self.attached = load_adapter(copy.deepcopy(self.stock), self.valid)
        self.before = {"stock": state(self.stock), "attached": state(self.attached)}
        self.logits = logits(self.attached)
        self.shapes = {
            name: layer.index.shape for name, layer in lift_layers(self.attached).items()
        }
        self.adapter.mkdir()
        self.listing = self.listed()
        os.chdir(work)

    def listed(self) -> set[tuple[str, int]]:
        """Everything below the root but the adapter under test: names and sizes."""
        return {
            (str(path), path.lstat().st_size if path.is_file() else 0)
            for path in self.root.rglob("*")
            if self.adapter not in (path, *path.parents)
        }

    def put(self, files: Files) -> None:
        shutil.rmtree(self.adapter)
        self.adapter.mkdir()
        for name, data in files.items():
            (self.adapter / name).write_bytes(data)

    def read(self, files: Files) -> None:
        with open_adapter(self.adapter) as adapter:
            layers = adapter.layers()
            expected = plain_reading(files[WEIGHTS], adapter.base.shapes)
        for name, offsets in layers.items():
            if offsets.active.index.shape != adapter.base.shapes[name]:
                raise InvalidContentError("another shape than the configuration says")
            check_layer(offsets, expected[name])

    def load(self, files: Files, attached: bool) -> None:
        """Onto a live model, which must be unchanged after a refusal."""
        kind = "attached" if attached else "stock"
        model = self.attached if attached else copy.deepcopy(self.stock)
        try:
            load_adapter(model, self.adapter)
        except UserError:
            same = same_state(state(model), self.before[kind])
            if not same or (attached and not torch.equal(logits(model), self.logits)):
                raise InvalidContentError(f"a refusal has changed a {kind} model") from None
            raise
        expected = plain_reading(files[WEIGHTS], self.shapes)
        for name, layer in lift_layers(model).items():
            check_layer(layer.learned, expected[name])
        logits(model)
        if attached:
            self.attached = load_adapter(copy.deepcopy(self.stock), self.valid)

    def merge(self, onto: str) -> None:
        try:
            merge_adapter(self.adapter, self.output, onto=onto, dtype="float32", progress=False)
        except UserError:
            if self.output.exists():
                raise InvalidContentError("a refused merge has left an output") from None
            raise
        with safe_open(self.output / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if not bool(torch.isfinite(file.get_tensor(name)).all()):
                    raise InvalidContentError(f"merged {name} is not finite")

    def run(self, files: Files, way: str, chance: random.Random) -> None:
        """One way in; raises what it raises."""
        self.put(files)
        try:
            with limits():
                if way == "read":
                    self.read(files)
                elif way == "load":
                    self.load(files, attached=chance.random() < 0.5)
                else:
                    self.merge(chance.choice(("original", "quantized")))
        finally:
            shutil.rmtree(self.output, ignore_errors=True)
            if self.listed() != self.listing:
                raise InvalidContentError(f"something was written: {self.listed() ^ self.listing}")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """At most so much more memory, and so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    bytes_now = pages * resource.getpagesize()
    old = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (bytes_now + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(count: int, seed: int, only: int | None, work: Path) -> tuple[list[dict[str, Any]], int]:
    """One row per form, way in and kind of mutation; and how many cases failed."""
    bench = Bench(work)
    tally: Counter[tuple[str, str, str, str]] = Counter()
    numbers = range(count) if only is None else [only]
    for number in numbers:
        chance = random.Random(f"{seed}:{number}")
        form = chance.choice(sorted(bench.forms))
        files = dict(bench.forms[form])
        kinds = [MUTATIONS[number % len(MUTATIONS)]]
        kinds += chance.choices(MUTATIONS, k=chance.choice((0, 0, 0, 1, 2)))
        for mutate in kinds:
            if {WEIGHTS, "adapter_config.json"} <= set(files):  # else nothing is left to damage
                mutate(chance, files)
        ways = ["read"]
        ways += ["load"] if number % LIVE_EVERY == 0 or form == "PEFT alone" else []
        ways += ["merge"] if number % MERGE_EVERY == 0 else []
        for way in ways:
            outcome = "loaded"
            try:
                bench.run(files, way, chance)
            except UserError as error:
                outcome = "refused"
                if only is not None:
                    print(f"{way}: {error}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = "failed"
                names = " + ".join(mutate.__name__ for mutate in kinds)
                print(f"--seed {seed} --only {number} ({form}, {names}, {way}): {error!r:.300}")
                if only is not None:
                    traceback.print_exc()
            tally[kinds[0].__name__, form, way, outcome] += 1
    keys = sorted({key[:3] for key in tally})
    rows = [
        {"mutation": kind, "form": form, "way in": way, "seed": seed}
        | {outcome: tally[kind, form, way, outcome] for outcome in OUTCOMES}
        for kind, form, way in keys
    ]
    return rows, sum(row["failed"] for row in rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'mutation':<18}" + "".join(f"{outcome:>10}" for outcome in OUTCOMES))
    for kind in sorted({row["mutation"] for row in rows}):
        sums = [sum(r[outcome] for r in rows if r["mutation"] == kind) for outcome in OUTCOMES]
        print(f"{kind:<18}" + "".join(f"{value:>10}" for value in sums))
    sums = [sum(row[outcome] for row in rows) for outcome in OUTCOMES]
    print(f"{'all':<18}" + "".join(f"{value:>10}" for value in sums))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one mutation, with its messages")
    parser.add_argument("--no_csv", action="store_true", help="only print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of odd regular expressions
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as work:
        rows, failed = fuzz(arguments.count, arguments.seed, arguments.only, Path(work).resolve())
        os.chdir(start)
    print_table(rows)
    if not arguments.no_csv and arguments.only is None:
        print(f"Wrote {write_rows('fuzz_adapter', rows)}")
    if failed:
        raise SystemExit(f"{failed} cases were neither loaded as they should nor refused")


if __name__ == "__main__":
    main()
