"""Folders and hub ids: what is refused before anything is read, and what pins a model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hestia import loading
from hestia.errors import ConfigError


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


INDEX = b'{"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("config.json"), "no config.json"),
        (_remove("model.safetensors"), "no .safetensors weights. Convert the checkpoint"),
        (_write("model.safetensors", b""), "damaged or truncated safetensors file"),
        (_write("model.safetensors", b"\xff" * 64), "damaged or truncated safetensors file"),
        (_write("model.safetensors.index.json", b"{"), "damaged index"),
        (_write("model.safetensors.index.json", b"[1]"), "damaged index"),
        (_write("model.safetensors.index.json", INDEX), "model-00002-of-00002.safetensors, which are not there"),
    ],
)
def test_a_damaged_folder_is_refused_before_any_weight_is_read(
    parent_copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(parent_copy)
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        loading.resolve(str(parent_copy))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickled_weights_are_named_and_left_alone(parent_copy: Path, suffix: str) -> None:
    (parent_copy / "model.safetensors").rename(parent_copy / f"weights{suffix}")
    with pytest.raises(ConfigError, match=rf"weights\{suffix}, and pickled weights can run code"):
        loading.resolve(str(parent_copy))


def test_pickled_weights_beside_safetensors_are_not_read(parent_copy: Path) -> None:
    (parent_copy / "pytorch_model.bin").write_bytes(b"\x80\x04not a model")
    assert loading.load_model(loading.resolve(str(parent_copy))).num_parameters() > 0


@pytest.mark.parametrize("name", ["./nothing", "/nothing/at/all", "a/b/c", "~/model"])
def test_a_name_that_is_a_path_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(loading.sources.HfApi, "model_info", never)
    with pytest.raises(ConfigError, match="no such model folder"):
        loading.resolve(name)


def test_a_file_is_no_model_folder(toy_parent: Path) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        loading.resolve(str(toy_parent / "config.json"))


def test_a_hub_id_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {None: "0123abcd", "v1": "4567cdef", "refs/pr/2": "89abcdef"}
    info = type("Info", (), {})

    def asked(self: Any, name: str, *, revision: str | None, timeout: float) -> Any:
        assert name == "owner/name"
        found = info()
        found.sha = commits[revision]
        return found

    monkeypatch.setattr(loading.sources.HfApi, "model_info", asked)
    source = loading.resolve("owner/name")
    assert (source.location, source.commit, source.is_local) == ("owner/name", "0123abcd", False)
    for revision in ("v1", "refs/pr/2"):
        source = loading.resolve(f"owner/name@{revision}")
        assert (source.name, source.location, source.commit) == (
            f"owner/name@{revision}",
            "owner/name",
            commits[revision],
        )


def test_a_commit_that_is_known_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, toy_parent: Path) -> None:
    monkeypatch.setattr(loading.sources.HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    whole = "0123456789abcdef" * 2 + "01234567"
    source = loading.resolve(f"owner/name@{whole}")
    assert (source.location, source.commit) == ("owner/name", whole)
    assert loading.resolve("owner/name@main", "c0ffee").commit == "c0ffee"
    assert loading.resolve(str(toy_parent), "c0ffee").is_local


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HFValidationError("bad"), "not a hub id"),
        (OSError("no network\nand more"), "the hub could not be asked (OSError: no network)"),
        (TimeoutError(), "the hub could not be asked (TimeoutError: )"),
        (None, "the hub could not be asked"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence(
    error: Exception | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NotFoundError(HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Not Found")

    def fails(*_: object, **__: object) -> None:
        raise error or NotFoundError()

    monkeypatch.setattr(loading.sources.HfApi, "model_info", fails)
    with pytest.raises(ConfigError) as caught:
        loading.resolve("owner/name")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


COMMIT, OTHER = "c0ffee" * 6 + "abcd", "beef" * 10


def cache_model(folder: Path, commit: str, *, refs: tuple[str, ...] = (), files: dict[str, str] | None = None) -> Path:
    """owner/name as the hub's cache holds it: the snapshot of one commit, and the names known for it."""
    home = folder / "models--owner--name"
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, text in {"config.json": '{"model_type": "llama"}', **(files or {})}.items():
        (snapshot / name).write_text(text, encoding="utf-8")
    for ref in refs:
        (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (home / "refs" / ref).write_text(commit, encoding="utf-8")
    return snapshot


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that does not answer."""

    def fails(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(loading.sources.HfApi, "model_info", fails)
    monkeypatch.setattr(loading.sources.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_a_hub_the_commit_of_the_cache_is_taken(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(loading.sources, "announce", said.append)
    cache_model(hub_cache, COMMIT, refs=("main",))
    cache_model(hub_cache, OTHER, refs=("v1", "refs/pr/2"))
    for name, commit in (("owner/name", COMMIT), ("owner/name@v1", OTHER), ("owner/name@refs/pr/2", OTHER)):
        source = loading.resolve(name)
        assert (source.location, source.commit) == ("owner/name", commit)
        assert said.pop() == f"{name}: the hub could not be asked; commit {commit} from the cache is taken"


def test_offline_mode_takes_the_commit_of_the_cache_too(tmp_path: Path) -> None:
    cache_model(tmp_path / "hub", COMMIT, refs=("main",))
    code = (
        "from hestia import loading\n"
        "source = loading.resolve('owner/name')\n"
        "print(source.commit, loading.load_config(source).model_type)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == [COMMIT, "llama"], done.stderr


def test_a_cache_that_does_not_know_the_branch_says_which_commits_it_has(hub_cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"no network\); the cache has nothing of it .* owner/name@COMMIT"):
        loading.resolve("owner/name")
    cache_model(hub_cache, COMMIT)
    with pytest.raises(ConfigError, match=f"knows no main of it, but other commits: write owner/name@{COMMIT}"):
        loading.resolve("owner/name")
    assert loading.resolve(f"owner/name@{COMMIT}").commit == COMMIT


@pytest.mark.parametrize("answer", ["RepositoryNotFoundError", "RevisionNotFoundError"])
def test_a_hub_that_has_no_such_model_is_believed(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    class Answer(getattr(loading.sources, answer)):
        def __init__(self) -> None:
            Exception.__init__(self, "404 Not Found")

    def fails(*_: object, **__: object) -> None:
        raise Answer

    cache_model(hub_cache, COMMIT, refs=("main",))
    monkeypatch.setattr(loading.sources.HfApi, "model_info", fails)
    with pytest.raises(ConfigError, match="404 Not Found"):
        loading.resolve("owner/name")


def test_the_licence_of_a_hub_id_is_read_from_the_cache(hub_cache: Path) -> None:
    source = loading.Source("owner/name", "owner/name", COMMIT)
    assert loading.license_of(source) is None
    cache_model(hub_cache, COMMIT, files={"README.md": "---\nlicense: llama3.2\n---\n"})
    assert loading.license_of(source) == "llama3.2"


def test_a_model_is_called_by_its_id_or_its_folder(
    hub_cache: Path, toy_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(location: str | Path, commit: str | None = None) -> str:
        return loading.display_name(loading.Source(f"{location}@v1.0", str(location), commit))

    assert name("owner/name", COMMIT) == "owner/name"
    snapshot = cache_model(hub_cache, COMMIT)
    assert name(snapshot) == name(f"{snapshot}/") == "owner/name"
    link = hub_cache / "my-model"
    link.symlink_to(snapshot)
    assert name(link) == "my-model"
    assert name(toy_parent) == "parent"
    monkeypatch.chdir(toy_parent)
    assert name(".") == name("../parent") == "parent"
    source = loading.resolve(str(toy_parent))
    monkeypatch.setattr(loading.sources, "display_name", lambda _: "as it is called")
    assert loading.describe(source, loading.load_config(source))["name"] == "as it is called"


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_front_matter_alone(parent_copy: Path, card: str, found: str | None) -> None:
    (parent_copy / "README.md").write_text(card, encoding="utf-8")
    assert loading.license_of(loading.resolve(str(parent_copy))) == found


def test_a_card_that_is_not_utf_8_does_no_harm(parent_copy: Path) -> None:
    (parent_copy / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    assert loading.license_of(loading.resolve(str(parent_copy))) == "mit"


def test_what_a_run_records_of_its_parent(toy_parent: Path) -> None:
    source = loading.resolve(str(toy_parent))
    record = loading.describe(source, loading.load_config(source))
    assert record == {
        "name": "parent", "commit": None, "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "vocab_size": 320,
    }  # fmt: skip


def test_content_tells_models_apart_by_what_decides_a_number(parent_copy: Path) -> None:
    source = loading.resolve(str(parent_copy))
    before = loading.fingerprint(source)
    assert set(before) == {"config.json", "model.safetensors"}
    (parent_copy / "README.md").write_text("hello", encoding="utf-8")
    assert loading.fingerprint(source) == before
    path = parent_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert loading.fingerprint(source)["model.safetensors"] != before["model.safetensors"]
    assert loading.fingerprint(loading.Source("a/b", "a/b", "c0ffee")) == {"commit": "c0ffee"}
