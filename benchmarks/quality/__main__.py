"""`python -m benchmarks.quality --preset cpu|gpu|paper [--quick] [--tables]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers

from benchmarks.common import RESULTS
from benchmarks.quality.base import known, pretrained
from benchmarks.quality.domain import Domain
from benchmarks.quality.identity import check_same
from benchmarks.quality.methods import Method
from benchmarks.quality.paper.command import add_arguments, from_arguments
from benchmarks.quality.presets import CPU, CPU_TEXT, GPU, QUICK, Preset, methods, quick
from benchmarks.quality.real.main import preset_of, real
from benchmarks.quality.real.main import update_readme as update_real
from benchmarks.quality.run import Results, Runner
from benchmarks.quality.shared import Work, run_jobs
from benchmarks.quality.skills import skills
from benchmarks.quality.table import update_readme
from benchmarks.quality.text import text
from leanlift.errors import UserError
from leanlift.io.files import digest_of

PRESETS = {"cpu": CPU, "gpu": GPU}
TEXT_PRESETS = {"cpu": CPU_TEXT, "gpu": GPU}
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
say = partial(print, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Make the runs that are missing, then the tables and plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--preset", choices=[*PRESETS, "real", "paper"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="four methods, half the steps")
    parser.add_argument("--source", type=Path, help="rows to pretrain on: the text domain")
    parser.add_argument("--data", type=Path, help="rows to teach: text, real, paper")
    parser.add_argument("--model", help="directory of a base: real, paper")
    parser.add_argument("--jobs", type=int, help="processes; two on a CPU that has two cores")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)  # one of several processes
    parser.add_argument("--cache", type=Path, default=Path("build/quality"), help="for the base")
    parser.add_argument("--tables", action="store_true", help="only write tables and plots")
    add_arguments(parser.add_argument_group("the paper preset"))
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"expected --jobs of at least 1, got {args.jobs}")
    if args.preset == "paper":
        from_arguments(args, parser)
        return
    if args.preset == "real":
        if not args.tables and (args.data is None or not args.data.is_file()):
            parser.error(f"real needs --data, a file of worked problems; got {args.data}")
        try:
            real_preset(args, list(sys.argv[1:] if argv is None else argv))
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
        return
    if (args.source is None) != (args.data is None):
        parser.error("the text domain needs both --source and --data")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    name = f"quality_{args.preset}" + ("_quick" if args.quick else "")
    results = Results(RESULTS / f"{name}.csv")
    try:
        if not args.tables:
            make_runs(args, name, results, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    if args.claims is None:
        update_readme(name, results.rows())


def make_runs(args: argparse.Namespace, name: str, results: Results, given: list[str]) -> None:
    """The runs of the presets that pretrain their base."""
    preset = (PRESETS if args.source is None else TEXT_PRESETS)[args.preset]
    preset = quick(preset) if args.quick else preset
    domain = domain_of(preset, args.source, args.data)
    if args.source is not None and args.claims is None:
        marks = {"--source": digest_of(args.source), "--data": digest_of(args.data)}
        for place in (RESULTS / f"{name}_{domain.name}", args.cache / domain.name):
            check_same(place.with_name(f"{place.name}_of.json"), marks)
    chosen = list(methods(preset))
    if args.quick:
        chosen = chosen[:QUICK]
    elif args.source is not None:
        chosen = [method for method in chosen if method.group == "headline"]
    base = base_of(domain, preset, args.cache)
    jobs = args.jobs or (1 if DEVICE.type == "cuda" else min(2, os.cpu_count() or 1))
    if args.claims is not None or jobs == 1:
        run(domain, preset, chosen, base, results, Work(args.claims))
    else:
        with tempfile.TemporaryDirectory() as claims:
            run_jobs(jobs, "benchmarks.quality", [*given, "--claims", claims])


def real_preset(args: argparse.Namespace, given: list[str]) -> None:
    """The comparison on a base that somebody trained."""
    model = None if args.model is None else Path(args.model)
    if model is not None and not (model / "config.json").is_file():
        raise SystemExit(f"{model} is no directory of a checkpoint: it has no config.json.")
    name, preset = preset_of(model, args.quick)
    if not args.tables:
        real(
            model, args.data, args.cache, name, preset,
            processes=args.jobs, claims=args.claims, given=given,
        )  # fmt: skip
    if args.claims is None:
        update_real(name, preset)


def domain_of(preset: Preset, source: Path | None, data: Path | None) -> Domain:
    """The text of two files, or else the generated skills."""
    if source is None or data is None:
        return skills(preset.train_rows, preset.test_rows, preset.pretraining_batch)
    return text(
        source,
        data,
        vocabulary=1024,
        longest=128,
        batch=preset.pretraining_batch // 4,
        test=preset.test_rows,
        generated=40,
        new_tokens=80,
    )


def base_of(domain: Domain, preset: Preset, cache: Path) -> Path:
    """The directory of the base, which is pretrained if need be."""
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)  # matrices this small only lose by sharing the work
    base = pretrained(domain, preset.size, cache, DEVICE)
    say("the base knows " + ", ".join(f"{k} {v['exact']:.1%}" for k, v in known(base).items()))
    return base


def run(
    domain: Domain,
    preset: Preset,
    chosen: list[Method],
    base: Path,
    results: Results,
    work: Work,
) -> None:
    """Go through the methods: first the headline, whose best learning rates others take."""
    runner = Runner(domain, base, preset.schedule, preset.seeds, results, DEVICE, say)
    headline = [method for method in chosen if method.group == "headline"]
    for method in headline:
        if work.claim(method.name):
            runner.method(method)
            work.finish(method.name)
    work.wait(method.name for method in headline)
    for method in headline[:QUICK]:
        if work.claim(f"{method.name}, frontier"):
            runner.frontier(method)
    for method in chosen:
        if method not in headline and work.claim(method.name):
            runner.method(method)


if __name__ == "__main__":
    main()
