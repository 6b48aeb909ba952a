"""Files are whole or absent; our safetensors writer writes what the library reads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from leanlift import UserError
from leanlift.io.tensors import (
    ShardedWriter,
    TensorSpec,
    is_running,
    new_directory,
    open_tensor_file,
    plan_shards,
    read_json,
    remove_partials,
    replacing,
    write_json,
    write_tensors,
)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_failed_directory_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_directory(tmp_path / "out") as temporary:
        (temporary / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "whole").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "whole").read_text() == "whole"


@pytest.mark.parametrize("limit", [1, 100, 10**9], ids=["tiny", "small", "one-file"])
def test_sharded_writer_round_trip(tmp_path: Path, limit: int) -> None:
    tensors = {
        "bf16": torch.randn(7, 5).bfloat16(),
        "fp16": torch.randn(3).half(),
        "fp32": torch.randn(4, 2, 3),
        "scalar": torch.tensor(2.5),
        "int": torch.arange(5),
        "empty": torch.empty(0, 4),
    }
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    with ShardedWriter(tmp_path, specs, limit) as writer:
        for name, tensor in tensors.items():
            pieces = tensor.split(2) if tensor.dim() == 2 and len(tensor) else [tensor]
            writer.write(name, pieces)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    many = len(list(tmp_path.glob("*.safetensors"))) > 1
    assert (tmp_path / "model.safetensors.index.json").exists() == many


def test_shards_stay_below_their_limit() -> None:
    specs = [TensorSpec(str(i), (size,), torch.uint8) for i, size in enumerate([4, 5, 20, 1, 9])]
    assert [[s.nbytes for s in shard] for shard in plan_shards(specs, 10)] == [[4, 5], [20], [1, 9]]


def test_broken_json_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_an_empty_directory_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "whole").write_text("whole")
    assert (tmp_path / "out" / "whole").read_text() == "whole"


def test_only_what_is_open_for_writing_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, which also opens no directory."""
    fcntl = pytest.importorskip("fcntl")
    real, opened, synced = os.fsync, os.open, []

    def fsync(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(handle)
        real(handle)

    def open_file(path: Any, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", open_file)
    write_json(tmp_path / "file.json", {"a": 1})
    with new_directory(tmp_path / "out") as temporary:
        (temporary / "whole").write_text("whole")
    assert len(synced) == 2


def test_what_killed_processes_have_left_is_deleted_and_what_live_ones_write_is_not(
    tmp_path: Path,
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert not is_running(dead.pid)
    assert is_running(os.getpid())
    living = tmp_path / f".a.json.{os.getppid()}.partial"
    other = tmp_path / f".b.json.{dead.pid}.partial"
    for path in (living, other, tmp_path / f".a.json.{dead.pid}.partial"):
        path.write_text("{")
    write_json(tmp_path / "a.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([living.name, other.name, "a.json"])
    (tmp_path / f".out.{dead.pid}.partial").mkdir()
    remove_partials(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([living.name, "a.json"])


def test_an_interrupt_inside_a_read_is_no_damaged_file(tmp_path: Path) -> None:
    """A Ctrl-C at any call inside the library's read stays one."""
    write_tensors(tmp_path / "x.safetensors", {"a": torch.arange(4.0), "b": torch.tensor(2)})
    ends = set()
    with open_tensor_file(tmp_path / "x.safetensors") as file:
        for at in range(1, 1000):  # a collection of garbage in between makes calls too
            calls = 0

            def interrupt(frame: Any, event: str, argument: Any, at: int = at) -> None:
                nonlocal calls
                calls += 1
                if calls == at:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

            try:
                sys.setprofile(interrupt)
                file.get("a")
                sys.setprofile(None)
                ends.add("read")
                break
            except KeyboardInterrupt:
                ends.add("interrupted")
        with pytest.raises(UserError, match="lacks c"):
            file.get("c")
    assert ends == {"read", "interrupted"}
