"""The packages that the GPU proof needs and a bare GPU machine may lack, as wheels to carry.

    python -m benchmarks.wheelhouse wheels                # here, with a package index at hand
    pip install --no-index --no-deps wheels/*.whl         # there; the last line printed says how

Made for Linux on x86_64 with Python 3.12 and torch (CUDA), triton, transformers, accelerate, peft,
safetensors, pyarrow, rich and jinja2 already there (`gpu_proof --part machine` says what is not).
Everything else that the proof imports is fetched without its dependencies, so that no second torch
comes along; together the wheels stay below 60 MB. liger-kernel is there for the rows with its
kernels alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "bitsandbytes>=0.50",
    "trl>=1.16,<2",
    "datasets>=4.7",
    "dill",
    "multiprocess",
    "xxhash",
    "pandas",
    "python-dateutil",
    "six",
    "liger-kernel>=0.8",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64", "any")
LIMIT = 60_000_000
"""Bytes of all of them."""


def fetch(directory: Path, python: str = "3.12") -> list[Path]:
    """Download the wheels; returns them."""
    directory.mkdir(parents=True, exist_ok=True)
    platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
    for package in PACKAGES:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--only-binary", ":all:", "--python-version", python, "--implementation", "cp",
             *platforms, "--dest", str(directory), package],
            check=True,
        )  # fmt: skip
    return sorted(directory.glob("*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="where the wheels go")
    parser.add_argument("--python", default="3.12", help="of the other machine")
    arguments = parser.parse_args()
    wheels = fetch(arguments.directory, arguments.python)
    total = sum(wheel.stat().st_size for wheel in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.1f} MB  {wheel.name}")
    most = LIMIT // 10**6
    print(f"{total / 1e6:7.1f} MB in all{'' if total <= LIMIT else f': MORE THAN {most}'}")
    print(
        f"There: pip install --no-index --no-deps {arguments.directory}/*.whl && "
        "python -m benchmarks.gpu_proof"
    )
    if total > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
