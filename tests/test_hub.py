"""Names and uploads, with the hub's client replaced at its edge: nothing goes over a network."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leanlift import UserError
from leanlift.hub import local_copy, push_to_hub


class Hub:
    """Stands for `HfApi` and notes what it is asked for."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}

    def create_repo(self, name: str, **options: Any) -> Any:
        self.created = {"name": name, **options}
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, **options: Any) -> Any:
        self.uploaded = options
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("leanlift.hub.HfApi", lambda: hub)
    return hub


def copy_of(source: str | Path) -> Path:
    return local_copy(source, ["*.json"], "the adapter", "name a directory")


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.hub.snapshot_download", lambda *a, **k: pytest.fail("asked"))
    assert copy_of(tmp_path) == tmp_path
    assert copy_of(str(tmp_path)) == tmp_path


def test_only_the_wanted_files_of_a_name_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr("leanlift.hub.snapshot_download", download)
    assert copy_of("someone/model") == tmp_path
    assert asked == {"name": "someone/model", "allow_patterns": ["*.json"]}


@pytest.mark.parametrize(
    "name",
    ["no-such-directory/x", "~nobody-at-all/x", "x" * 300, "x" * 9000, "a\0b", "../x", "\ud800"],
)
def test_names_that_cannot_be_had_are_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=r"the adapter .*: name a directory\."):
        copy_of(name)


def test_an_upload_takes_what_is_served_and_nothing_else(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert push_to_hub(tmp_path, "name", private=True, message="why") == "https://hub/commit/1"
    assert hub.created == {"name": "name", "private": True, "exist_ok": True}
    assert hub.uploaded["repo_id"] == "someone/name"
    assert hub.uploaded["folder_path"] == tmp_path
    assert hub.uploaded["commit_message"] == "why"


def test_what_only_a_resume_needs_is_not_uploaded(tmp_path: Path, hub: Hub) -> None:
    from huggingface_hub.utils import filter_repo_objects

    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    push_to_hub(tmp_path, "name")
    kept = filter_repo_objects(
        [
            "adapter_model.safetensors",
            "adapter_config.json",
            "README.md",
            "chat_template.jinja",
            "checkpoint-5/adapter_model.safetensors",
            "optimizer.safetensors",
            "trainer_state.json",
            "run.json",
            "rng_state.pth",
            ".env.json",
        ],
        allow_patterns=hub.uploaded["allow_patterns"],
        ignore_patterns=hub.uploaded["ignore_patterns"],
    )
    assert list(kept) == [
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "chat_template.jinja",
    ]


def test_a_directory_without_weights_is_not_uploaded(tmp_path: Path, hub: Hub) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="neither an adapter nor a checkpoint"):
            push_to_hub(directory, "name")
    assert hub.created == {}


def test_what_the_hub_refuses_is_one_sentence(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> Any:
        raise OSError("no route\nto the hub")

    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(UserError, match=r"the hub does not take .*: no route\.$"):
        push_to_hub(tmp_path, "name")
