"""Names and uploads, with the hub's client replaced at its edge: nothing goes over a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leanlift import UserError
from leanlift.io.hub import local_copy, push_to_hub


class Hub:
    """Stands for `HfApi` and notes what it is asked for."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, **options: Any) -> Any:
        self.created = {"name": name, **options}
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, **options: Any) -> Any:
        self.uploaded = options
        folder = options["folder_path"]
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("leanlift.io.hub.HfApi", lambda: hub)
    return hub


def copy_of(source: str | Path) -> Path:
    return local_copy(source, ["*.json"], "the adapter", "name a directory")


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.io.hub.snapshot_download", lambda *a, **k: pytest.fail("asked"))
    assert copy_of(tmp_path) == tmp_path
    assert copy_of(str(tmp_path)) == tmp_path


def test_only_the_wanted_files_of_a_name_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr("leanlift.io.hub.snapshot_download", download)
    assert copy_of("someone/model") == tmp_path
    assert asked == {"name": "someone/model", "allow_patterns": ["*.json"], "revision": None}


@pytest.mark.parametrize(
    "name",
    ["no-such-directory/x", "~nobody-at-all/x", "x" * 300, "x" * 9000, "a\0b", "../x", "\ud800"],
)
def test_names_that_cannot_be_had_are_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the adapter .*: name a directory\."):
        copy_of(name)


def test_an_upload_takes_what_is_served_and_nothing_else(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert push_to_hub(tmp_path, "name", private=True, message="why") == "https://hub/commit/1"
    assert hub.created == {"name": "name", "private": True, "exist_ok": True}
    assert hub.uploaded["repo_id"] == "someone/name"
    assert hub.files == {"adapter_model.safetensors": b"x"}
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


LOCAL = ["/home/me/models/base", "~/models/base", "../base", "C:\\models\\base", "/srv/base/"]


@pytest.mark.parametrize("name", LOCAL)
def test_paths_of_this_machine_are_not_sent(
    tmp_path: Path, hub: Hub, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    data = {"base": {"name": name, "shapes": {"a.b": [1, 2]}}, "note": "see a/b", "n": 3}
    for file in ("adapter_config.json", "leanlift.json", "config.json"):
        (tmp_path / file).write_text(json.dumps({**data, "base_model_name_or_path": name}))
    (tmp_path / "memory.json").write_text(json.dumps({"plan": {"model": name}}))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    push_to_hub(tmp_path, "name")
    sent = json.loads(hub.files["adapter_config.json"])
    assert sent == {
        "base": {**data["base"], "name": "base"},
        "note": "see a/b",
        "n": 3,
        "base_model_name_or_path": "base",
    }
    assert not any(name.encode() in file for file in hub.files.values())
    assert "without the paths of this machine" in caplog.text
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_names_on_the_hub_are_sent_as_they_are(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "adapter_config.json").write_text('{"base": {"name": "acme/tiny"}}')
    push_to_hub(tmp_path, "name")
    assert hub.files["adapter_config.json"] == b'{"base": {"name": "acme/tiny"}}'


def test_links_to_elsewhere_are_not_sent(tmp_path: Path, hub: Hub) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "secret").write_text("{}")
    (adapter / "notes.json").symlink_to(tmp_path / "secret")
    push_to_hub(adapter, "name")
    assert set(hub.files) == {"adapter_model.safetensors"}
