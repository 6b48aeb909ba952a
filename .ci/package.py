"""Build the wheel and the sdist, look into both, and use the wheel as a stranger would.

    python .ci/package.py [--torch "torch==2.13.0"] [--shared] [--keep DIR]     (or: make package)

The sdist is built from the working tree and the wheel from the sdist; `twine check --strict` reads
their metadata. The sdist has to hold every file that git tracks, and some of its tests are run out
of it. The wheel is installed with what it needs into a new environment, and `pip check`, `leanlift
--version`, `doctor` and `demo` are run there, outside of the repository. To install torch takes
minutes and gigabytes; with `--shared` the new environment has leanlift from the wheel, and all else
from the environment that runs this, whose own leanlift it does not see.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_THE_WHEEL = (
    "leanlift/py.typed",
    "leanlift/demo/base/model.safetensors",
    "leanlift/demo/base/tokenizer.json",
    "leanlift/demo/seven_b/config.json",
    "leanlift/demo/known/Llama-2-7B/config.json",
    "leanlift/report/page.html.jinja",
)
FIELDS = ("Name", "Version", "Summary", "Requires-Python", "License-Expression", "Author")
TESTS = ("tests/house/test_project.py", "tests/cli/test_places.py")
"""Of the sdist: one of the repository's own files, one that needs what other tests share."""


SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
WHERE = "import leanlift, pathlib; print(pathlib.Path(leanlift.__file__).resolve())"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="what pip is given for torch")
    parser.add_argument("--shared", action="store_true", help="install the wheel alone")
    parser.add_argument("--keep", type=Path, help="where wheel and sdist go; default: thrown away")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch) / "dist"
        run(sys.executable, "-m", "build", "--outdir", str(place), str(ROOT))
        (wheel,), (sdist,) = place.glob("*.whl"), place.glob("*.tar.gz")
        run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist))
        refuse(problems_of_wheel(wheel))
        refuse(problems_of_sdist(sdist, tracked_files()))
        use_sdist(sdist, Path(scratch) / "source")
        use_wheel(wheel, Path(scratch) / "clean", None if options.shared else options.torch)
    print(f"{wheel.name} and {sdist.name}: whole, and the wheel works.", flush=True)


def problems_of_wheel(wheel: Path) -> list[str]:
    """What is missing in a wheel or does not belong into it, and metadata that is not there."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(opened.read(metadata).decode())
    home = metadata.rpartition("/")[0]
    missing = {*IN_THE_WHEEL, f"{home}/entry_points.txt", f"{home}/licenses/LICENSE"} - names
    strangers = [name for name in names if not name.startswith(("leanlift/", f"{home}/"))]
    strangers += [name for name in names if name.endswith((".pyc", ".partial"))]
    return [
        *(f"the wheel lacks {name}" for name in sorted(missing)),
        *(f"the wheel has {name}" for name in sorted(strangers)),
        *(f"the metadata have no {name}" for name in FIELDS if not told[name]),
    ]


def problems_of_sdist(sdist: Path, tracked: Iterable[str]) -> list[str]:
    """Files that git tracks and an sdist lacks."""
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    return [f"the sdist lacks {name}" for name in sorted(set(tracked) - names)]


def tracked_files() -> list[str]:
    """What git tracks here; nothing where this is no repository."""
    if not (ROOT / ".git").exists():
        return []
    listed = run("git", "-C", str(ROOT), "ls-files", "-z", capture=True)
    return [name for name in listed.split("\0") if name and (ROOT / name).exists()]


def use_sdist(sdist: Path, place: Path) -> None:
    """Run a few of its tests out of it, by this environment."""
    with tarfile.open(sdist) as opened:
        opened.extractall(place, filter="data")
    (source,) = place.iterdir()
    there = {"PYTHONPATH": str(source)}
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, cwd=source, **there)


def use_wheel(wheel: Path, place: Path, torch: str | None) -> None:
    """Install it into a new environment, and run the demo there.

    Args:
        torch: what pip is given for it; None: everything but leanlift is this environment's.
    """
    run(sys.executable, "-m", "venv", str(place))
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    python = str(programs / "python")
    install = (python, "-m", "pip", "install", "--quiet", "--no-compile")  # little of it is run
    outside = {"cwd": place, "PYTHONPATH": ""}
    if torch is None:
        run(*install, "--no-deps", str(wheel))
        home = Path(run(python, "-c", SITE, capture=True).strip())
        (home / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    else:
        run(*install, *shlex.split(torch))
        run(*install, str(wheel))
        run(python, "-m", "pip", "check")
    imported = Path(run(python, "-c", WHERE, capture=True, **outside).strip())
    assert imported.is_relative_to(place.resolve()), f"{imported} is not the wheel's"
    run(str(programs / "leanlift"), "--version", **outside)
    run(str(programs / "leanlift"), "doctor", **outside)
    run(str(programs / "leanlift"), "demo", "--output_dir", "demo", **outside)


def refuse(problems: list[str]) -> None:
    """End here, if there are any."""
    if problems:
        raise SystemExit("\n".join(problems))


def run(*command: str, cwd: Path = ROOT, capture: bool = False, **environment: str) -> str:
    """Run a command, which has to succeed; returns what it wrote, if that is captured."""
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, check=True, text=True,
        stdout=subprocess.PIPE if capture else None,
    )  # fmt: skip
    return done.stdout or ""


if __name__ == "__main__":
    main()
