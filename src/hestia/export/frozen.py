"""The frozen model on disk: what every exporter reads and every verification compares with.

    RUN/model/              a dense Hugging Face folder, quantized weights as codes * scales in the parent's dtype
    RUN/codes.safetensors   the same weights as integers: ``PATH.codes`` int8 [O, I], ``PATH.scales`` fp32 [R, G]

Tensors are read one at a time; nothing holds the whole model in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import digests
from ..errors import ConfigError
from ..files import read_json, replacing, save_file
from ..quant.codes import QuantizedTensor

CODES_FILE = "codes.safetensors"
MODEL_FOLDER = "model"
REFITS_FOLDER = "refits"
_SCHEMA = "1"


def save_codes(path: Path, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Write codes.safetensors atomically."""
    arrays: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        arrays[f"{name}.codes"] = tensor.codes.contiguous()
        arrays[f"{name}.scales"] = tensor.scales.contiguous()
    groups = {name: tensor.group_size for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata={"schema": _SCHEMA, "group_size": json.dumps(groups)})


class FrozenModel:
    """A run's frozen model, opened for reading.

    Args:
        run: the run's folder.

    Attributes:
        folder: the dense Hugging Face folder.
        config: its config.json.
        quantized: module paths of the quantized weights, in file order.

    Raises:
        ConfigError: the run has no frozen model yet, or a file of it is damaged.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / MODEL_FOLDER
        codes = run / CODES_FILE
        if not codes.is_file() or not (self.folder / "config.json").is_file():
            raise ConfigError(
                f"{run}: holds no frozen model ({CODES_FILE} and {MODEL_FOLDER}/); train it to the end first"
            )
        self.config = read_json(self.folder / "config.json")
        try:
            self._codes = safe_open(codes, framework="pt")
            metadata = self._codes.metadata() or {}
            self._files = {f: safe_open(f, framework="pt") for f in sorted(self.folder.glob("*.safetensors"))}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{run}: a safetensors file of the frozen model is damaged ({error})") from None
        if metadata.get("schema") != _SCHEMA:
            raise ConfigError(f"{codes}: schema {metadata.get('schema')!r}, this version reads {_SCHEMA!r}")
        self._groups = json.loads(metadata["group_size"])
        self.quantized: tuple[str, ...] = tuple(self._groups)
        self._where = {name: handle for handle in self._files.values() for name in handle.keys()}  # noqa: SIM118

    def names(self) -> Iterator[str]:
        """The names of all dense tensors, as the Hugging Face model knows them."""
        return iter(self._where)

    def shards(self) -> dict[str, list[str]]:
        """File name -> the names of its tensors."""
        return {file.name: list(handle.keys()) for file, handle in self._files.items()}

    def tensor(self, name: str) -> Tensor:
        """One dense tensor by name, ``model.layers.0.mlp.up_proj.weight``."""
        return self._where[name].get_tensor(name)

    def codes(self, path: str) -> QuantizedTensor:
        """One quantized weight by module path, ``model.layers.0.mlp.up_proj``."""
        return QuantizedTensor(
            self._codes.get_tensor(f"{path}.codes"), self._codes.get_tensor(f"{path}.scales"), self._groups[path]
        )

    @cached_property
    def identity(self) -> str:
        """A hash of the files that exports are made from; of large ones it sees samples (``digests.of_large_file``)."""
        files = [self.run / CODES_FILE, *(f for f in sorted(self.folder.rglob("*")) if f.is_file())]
        lines = (os.fsencode(f"{digests.of_large_file(file)}  {file.relative_to(self.run)}\n") for file in files)
        return hashlib.sha256(b"".join(lines)).hexdigest()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weights."""
        return self.tensor(f"{self.quantized[0]}.weight").dtype
