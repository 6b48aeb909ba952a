"""Files are whole or absent; our safetensors writer writes what the library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from leanlift import UserError
from leanlift.checkpoint import (
    ShardedWriter,
    TensorSpec,
    new_directory,
    plan_shards,
    read_json,
    replacing,
    write_json,
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
