"""Two processes over gloo give the table of one: through ``calibrate`` and through the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hestia
from hestia import processes, tiny
from hestia.curvature import Sensitivity, parallel
from hestia.curvature.estimators import Diagonals
from hestia.errors import CalibrationError, ConfigError

SOURCE = str(Path(hestia.__file__).parents[1])

WORKER = """
import sys
from pathlib import Path
import torch
from torch import nn
from hestia import processes
from hestia.curvature import Stopping, calibrate
from hestia.quant import QuantSpec

torch.set_num_threads(1)

class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 13, bias=False)

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))

toy, out = Toy().double(), Path(sys.argv[1])
ids = torch.randint(0, 13, (9, 6), generator=torch.Generator().manual_seed(0))
weights = {"body": toy.body.weight, "head": toy.head.weight}
with processes.joined() as first:
    assert first == (processes.rank() == 0)
    for estimator in ("gnb", "hutchinson", "hutchpp", "kl"):
        # doubled from 4 to 8 to 9: one sequence for two processes at the end
        table = calibrate(toy, weights, ids, estimator=estimator, forward=toy, seed=3, diagonals=4,
                          candidates={"ternary": QuantSpec()}, stopping=Stopping(start=4, half_width=1e-9))
        table.save(out / f"{estimator}-{processes.rank()}.json")
"""


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    more = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = os.pathsep.join([SOURCE, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(more if world > 1 else {})}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(world: int, script: Path, out: Path) -> None:
    out.mkdir()
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(out)], env=environment(rank, world, port), stderr=subprocess.PIPE
        )
        for rank in range(world)
    ]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()


@pytest.mark.slow  # three interpreters with torch: about ten seconds
def test_two_processes_give_the_table_of_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    run(1, script, tmp_path / "one")
    run(2, script, tmp_path / "two")
    for estimator in ("gnb", "hutchinson", "hutchpp", "kl"):
        one = Sensitivity.load(tmp_path / "one" / f"{estimator}-0.json")
        for rank in range(2):
            two = Sensitivity.load(tmp_path / "two" / f"{estimator}-{rank}.json")
            assert two.quantities == one.quantities and two.sequences == one.sequences == 9
            assert "budget of 9" in two.stopped
            for path, tensor in one.tensors.items():
                assert two.tensors[path].samples == pytest.approx(tensor.samples, rel=1e-9), estimator
                for name, column in tensor.others.items():
                    assert two.tensors[path].others[name] == pytest.approx(column, rel=1e-9)
                assert (two.tensors[path].gauss_newton is None) == (tensor.gauss_newton is None)
    alone = load_file(tmp_path / "one" / "gnb-0.safetensors")
    assert sorted(alone) == ["body/group", "body/output_channel", "head/group", "head/output_channel"]
    for rank in range(2):
        shared = load_file(tmp_path / "two" / f"gnb-{rank}.safetensors")
        assert shared.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(shared[name], tensor, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_torchrun_hestia_calibrate(tmp_path: Path) -> None:
    """The command as documented: one file, one line of JSON on standard output, the numbers of one process."""
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 60)
    arguments = ["-m", "hestia", "calibrate", str(tiny.model_path()), "--data", str(text), "--seq-len", "16"]
    arguments += ["--calibrate", "4", "--threads", "1", "--json", "--out"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    records = []
    for name, command in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run(
            [*command, *arguments, str(tmp_path / f"{name}.json")],
            env=environment(0, 1, 0),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.strip().splitlines()
        assert len(lines) == 1, "only the first process speaks"
        records.append(json.loads(lines[0]))
        assert json.loads((tmp_path / f"{name}.json").read_text()) == records[-1]
    one, two = (Sensitivity.from_json(record) for record in records)
    assert one.sequences == two.sequences == 4
    for path, tensor in one.tensors.items():
        assert two.tensors[path].samples == pytest.approx(tensor.samples, rel=1e-4), path


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.joined() as first:
        assert first and not torch.distributed.is_initialized()
    assert (processes.rank(), processes.world_size()) == (0, 1)


def test_processes_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2.*cannot reach.*torchrun"), processes.joined():
        pass


class OtherProcess:
    """A second process's messages, played back: what ``gathered`` sees without one."""

    def __init__(self, names: list[tuple[str, str]], table: torch.Tensor) -> None:
        text = json.dumps(names).encode()
        self.answers = [torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8), table]

    def all_gather(self, out: list[torch.Tensor], mine: torch.Tensor) -> None:
        out[0].copy_(mine)
        answer = self.answers.pop(0)
        if answer.dtype == torch.uint8:
            out[1].fill_(ord(" "))[: len(answer)] = answer
        else:
            out[1].copy_(answer)


def test_rows_are_interleaved_and_what_one_process_lacks_stays_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 4, 6 here, 5 there; the other did not reach tensor b, and measured a NaN, which is a sample."""
    names = [("a", "trace"), ("b", "trace")]
    theirs = torch.zeros(2, 3, 2, dtype=torch.float64)
    theirs[0, 1, 0], theirs[1, 1, 0] = float("nan"), 1.0
    for module in (parallel, processes):
        monkeypatch.setattr(module, "running", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_gather", OtherProcess(names[:1], theirs).all_gather)
    mine = {4: {"a": {"trace": 1.0}, "b": {"trace": 2.0}}, 6: {"a": {"trace": 3.0}, "b": {"trace": 4.0}}}
    rows = parallel.gathered(mine, 4, 7)
    assert rows[0] == mine[4] and rows[2] == mine[6]
    assert list(rows[1]) == ["a"] and rows[1]["a"]["trace"] != rows[1]["a"]["trace"]
    with pytest.raises(CalibrationError, match="1 sequences are too few for 2 processes"):
        parallel.gathered(mine, 0, 1)


def test_diagonals_are_added_up_with_the_sequences_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has seen as much as this one: everything doubles, the count as well."""
    sums = Diagonals("row", {"a": torch.zeros(3, 4)})
    assert sums.state()
    for tensor in sums.state().values():
        tensor.fill_(2.5)
    sums.sequences = 3
    monkeypatch.setattr(parallel, "running", lambda: True)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    both = parallel.summed(sums)
    assert both.sequences == 6
    assert all(bool((tensor == 5.0).all()) for tensor in both.state().values())


def test_a_number_of_processes_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two', which is no number"), processes.joined():
        pass
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        processes.require_joined()
