"""Free memory as control groups leave it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hestia import resources


def group(folder: Path, names: tuple[str, str], limit: str, used: int, cached: str) -> None:
    """The files of one control group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{cached} 100\n")


@pytest.mark.parametrize(
    ("number", "line", "names", "cached"),
    [
        (0, "0::/user.slice/job_7/step_0", ("memory.max", "memory.current"), "inactive_file"),
        (
            1,
            "9:cpu,cpuacct:/elsewhere\n4:memory:/user.slice/job_7/step_0",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "total_inactive_file",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_the_tightest_group_above_a_process_counts(
    number: int, line: str, names: tuple[str, str], cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, says = tmp_path / "cgroup", tmp_path / "self"
    says.write_text(f"{line}\n")
    monkeypatch.setattr(resources, "_SELF", says)
    version = dataclasses.replace(resources._VERSIONS[number], root=root)
    monkeypatch.setattr(resources, "_VERSIONS", (version,))
    assert resources._control_group() is None
    job = root / "user.slice" / "job_7"
    group(job / "step_0", names, "9000", 1000, cached)
    group(job, names, "4000", 1500, cached)
    group(root / "user.slice", names, "max", 0, cached)
    group(root, names, "100000", 5000, cached)
    assert resources._control_group() == 4000 - 1500 + 100
    available = resources.available_memory()
    assert available is not None and available <= 2600
    says.unlink()
    assert resources._control_group() == 100000 - 5000 + 100
