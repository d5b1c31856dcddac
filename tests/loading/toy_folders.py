"""What the tests of loading do to a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_config(folder: Path, **values: Any) -> None:
    """Change some keys of config.json; a None removes its key."""
    path = folder / "config.json"
    record = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}), encoding="utf-8")
