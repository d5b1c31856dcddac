"""Where a model comes from: a local folder, checked, or a hub id, pinned to a commit; and what a run records of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open

from .. import digests
from ..errors import ConfigError
from ..files import read_json, require_regular
from ..progress import announce

_CLIENT_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Of whichever HTTP client this version of the hub library uses."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHOWN = 3
"""Commits of the cache that a message names, at most."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: what the user typed.
        location: local folder or hub id that transformers reads, without a revision.
        commit: hub commit; None for a local folder.
    """

    name: str
    location: str
    commit: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the model lies in a local folder."""
        return self.commit is None


def resolve(name: str, commit: str | None = None) -> Source:
    """Find a model by local folder or hub id; hub ids are pinned to a commit, that of the cache where no hub answers.

    Args:
        name: a folder, owner/name, or owner/name@REVISION: a branch, a tag or a commit.
        commit: of a hub id, where it is known; as with a whole commit in ``name``, the hub is not asked for today's.

    Raises:
        ConfigError: neither a folder with a config.json nor a hub model that can be reached or is in the cache; a
            folder with weights in a format other than safetensors; a truncated or damaged safetensors file.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder)
        return Source(name=name, location=str(folder))
    location, _, revision = name.partition("@")
    if folder.exists() or name.startswith((".", "/", "~")) or location.count("/") > 1:
        raise ConfigError(f"{name}: no such model folder")
    if commit is None and _COMMIT.fullmatch(revision):
        commit = revision
    if commit is not None:
        return Source(name=name, location=location, commit=commit)
    try:
        commit = HfApi().model_info(location, revision=revision or None, timeout=20).sha
    except HFValidationError:
        raise ConfigError(f"{name}: no such model folder, and not a hub id (owner/name)") from None
    except (HfHubHTTPError, _CLIENT_ERROR, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[:1]
        refusal = (
            f"{name}: no such local folder, and the hub could not be asked ({type(error).__name__}: {''.join(first)})"
        )
        if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            raise ConfigError(refusal) from None  # an answer
        commit = _cached_commit(location, revision)
        if commit is None:
            raise ConfigError(f"{refusal}; {_cached(location, revision)}") from None
        announce(f"{name}: the hub could not be asked; commit {commit} from the cache is taken")
    return Source(name=name, location=location, commit=commit)


def _cached_commit(location: str, revision: str) -> str | None:
    """The commit that a branch or tag of a hub id had when the hub's cache last saw it."""
    config = try_to_load_from_cache(location, "config.json", revision=revision or "main")
    return Path(config).parent.name if isinstance(config, str) else None


def _cached(location: str, revision: str) -> str:
    """What to write where the cache does not know a branch or tag: a commit, which it may hold all the same."""
    snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=location, repo_type="model"), "snapshots")
    commits = sorted(path.parent.name for path in snapshots.glob("*/config.json"))
    if not commits:
        return f"the cache has nothing of it (a model that it has is also found as {location}@COMMIT)"
    named = " or ".join(f"{location}@{commit}" for commit in commits[:_SHOWN])
    return f"the cache knows no {revision or 'main'} of it, but other commits: write {named}"


def config_source(name: str) -> Source:
    """Where a model's configuration comes from; no weights are needed.

    Args:
        name: a folder with a config.json, the path of such a file, or a hub id.

    Raises:
        ConfigError: none of these.
    """
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        return Source(name=name, location=str(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: no config.json; is this a Hugging Face model folder?")
        return Source(name=name, location=str(path))
    return resolve(name)


def _check_folder(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_dir():
            require_regular(path)  # a pipe or device in the folder would be waited for for ever
    if not (folder / "config.json").is_file():
        if (folder / "run.yaml").is_file() and (folder / "model" / "config.json").is_file():
            raise ConfigError(f"{folder}: a run; its frozen model is {folder / 'model'}")
        if (folder / "run.yaml").is_file():
            raise ConfigError(f"{folder}: a run that holds no frozen model yet; finish it with --resume")
        raise ConfigError(f"{folder}: no config.json; is this a Hugging Face model folder?")
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder}: adapter_config.json makes it an adapter to another model; merge the two first and give the "
            "merged model, or remove that file if the weights are merged already"
        )
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f" It holds {', '.join(pickled)}, and pickled weights can run code." if pickled else ""
        raise ConfigError(f"{folder}: no .safetensors weights.{found} Convert the checkpoint to safetensors first")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: damaged or truncated safetensors file ({error})") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(map(str, read_json(index)["weight_map"].values()))
        except (ConfigError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"{index}: damaged index") from None
        missing = sorted(named - {p.name for p in weights})
        if missing:
            raise ConfigError(f"{folder}: the index names {', '.join(missing)}, which are not there")


def license_of(source: Source) -> str | None:
    """The licence that the front matter of a model's README.md names; of a hub id, the README.md that is cached."""
    if source.is_local:
        card = Path(source.location) / "README.md"
    else:
        cached = try_to_load_from_cache(source.location, "README.md", revision=source.commit)
        card = Path(cached if isinstance(cached, str) else "")
    if not card.is_file():
        return None
    found = re.search(
        r"\A---\n.*?^license:\s*([\w.-]+)\s*$.*?^---$", card.read_text("utf-8", "replace"), re.MULTILINE | re.DOTALL
    )
    return found.group(1) if found else None


def display_name(source: Source) -> str:
    """What people know a model by: ``owner/name`` of a hub id or of a snapshot in the hub's cache, else its folder.

    A revision is left out, and a link keeps its own name.
    """
    if not source.is_local:
        return source.location
    path = Path(os.path.abspath(source.location))  # noqa: PTH100, resolve() would follow the link
    kind, _, name = path.parent.parent.name.partition("--")
    return name.replace("--", "/") if path.parent.name == "snapshots" and kind == "models" and name else path.name


def describe(source: Source, config: Any) -> dict[str, Any]:
    """What a run records of its parent: name, commit, architecture, shape."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    shape = {k: getattr(config, k) for k in keys if hasattr(config, k)}
    return {"name": display_name(source), "commit": source.commit, **shape}


def fingerprint(source: Source) -> dict[str, Any]:
    """What pins a model's content: the hub's commit, or the digest of every file that decides a number."""
    if not source.is_local:
        return {"commit": source.commit}
    folder = Path(source.location)
    names = sorted(p.name for p in folder.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
    return {name: digests.of_large_file(folder / name) for name in names}
