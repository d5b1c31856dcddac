"""The last stages: what the run's own exports replace, what is not written twice, and what the report says of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from toy_runs import CALIBRATED, QUICK, Invoke, make_parent

from hestia.errors import BusyError, ExportError, VerifyError
from hestia.export.frozen import FrozenModel
from hestia.export.gguf_layout import Parent
from hestia.files import write_json
from hestia.options import Options, load_config
from hestia.pipeline import Workspace, delivery, export_and_verify
from hestia.plans import Plan

Resume = Callable[[], tuple[int, str, str]]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def states(run: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of every exported file."""
    files = (f for f in (run / "exports").rglob("*") if f.is_file())
    return {f.relative_to(run).as_posix(): (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change, exported as hf and gguf:q4_0."""
    return Path(shutil.copytree(toy_run, tmp_path / "run"))


@pytest.fixture
def resume(invoke: Invoke, run: Path, toy_parent: Path, toy_text: Path, toy_held_out: Path, lean: None) -> Resume:
    """The run's command again, with ``--resume``."""
    words = ("quantize", toy_parent, "--data", toy_text, "--eval-data", toy_held_out, "--out", run, *QUICK, *CALIBRATED)
    return lambda: invoke(*words, "--target", "hf", "--target", "gguf:q4_0", "--resume")


def damage(path: Path) -> bytes:
    """Flip a bit near the end of a file and return what it was before."""
    good = path.read_bytes()
    path.write_bytes(good[:-40] + bytes([good[-40] ^ 1]) + good[-39:])
    return good


# --- nothing of anyone else's is deleted -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["hf", "gguf:q4_0", "mlx"])
def test_what_lies_at_the_path_is_refused_and_stays(toy_run: Path, tmp_path: Path, target: str) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    for path in (folder / "precious.txt", file):
        path.write_text("years of work", encoding="utf-8")
    for path in (folder, file):
        with pytest.raises(ExportError, match="already exists"):
            export_and_verify(FrozenModel(toy_run), target, path, False, refit=True)
    assert (folder / "precious.txt").read_text(encoding="utf-8") == file.read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("error", [KeyboardInterrupt, VerifyError])
def test_an_earlier_file_goes_when_the_new_one_is_verified_and_not_before(
    run: Path, resume: Resume, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    (run / "report.json").unlink()  # so that nothing says that the files stand
    before = states(run)

    def fails(path: Path, *_: Any, **__: Any) -> None:
        assert path.exists() and path.parent in (run / "exports", run / "exports" / "gguf-q4_0")
        raise error(f"{path}: stopped")

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "verify", fails)
        status, _, err = resume()
    assert status == (130 if error is KeyboardInterrupt else 3)
    assert states(run) == before
    if error is VerifyError:
        assert f"{run / 'exports' / 'hf'}: stopped" in err and ".tmp" not in err
    assert resume()[0] == 0
    after = states(run)
    assert {name: content for name, (_, content) in after.items()} == {n: c for n, (_, c) in before.items()}
    assert all(after[name][0] > before[name][0] for name in after)


def test_a_refused_format_leaves_no_empty_folder(toy_run: Path, run: Path) -> None:
    work = Workspace(Options(**load_config(toy_run / "run.yaml") | {"out": str(run)}), resume=True)
    shutil.rmtree(run / "exports" / "gguf-q4_0")
    frozen = FrozenModel(run)
    frozen.config["model_type"] = "homemade"
    with pytest.raises(ExportError, match="'homemade' has no GGUF export"):
        delivery.deliver(work, Plan.load(run / "plan.json"), "gguf:q4_0", frozen)
    assert [path.name for path in (run / "exports").iterdir()] == ["hf"]


def test_a_damaged_report_is_said_before_anything_is_written(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    (run / "report.json").write_text("{", encoding="utf-8")
    status, _, err = invoke("export", run, "--to", "gguf:q4_0", "--out", tmp_path / "a.gguf")
    assert status == 2 and "report.json: not a readable JSON file" in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- nothing is written twice ----------------------------------------------------------------------------------------


def test_a_finished_run_that_is_resumed_leaves_its_files_and_entries(
    run: Path, resume: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, entries = states(run), read(run / "report.json")["exports"]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the file is there")

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "export_model", never)
        status, _, err = resume()
    assert status == 0, err
    assert f"gguf:q4_0: {run / 'exports' / 'gguf-q4_0'}" in err and "is there, as it was verified" in err
    assert states(run) == before
    assert read(run / "report.json")["exports"] == entries


@pytest.mark.parametrize("file", ["hf/model.safetensors", "hf/tokenizer.json", "gguf-q4_0/parent-q4_0.gguf"])
def test_a_damaged_file_is_written_again_and_no_other(run: Path, resume: Resume, file: str) -> None:
    before, path = states(run), run / "exports" / file
    good = damage(path)
    status, _, err = resume()
    assert status == 0, err
    assert path.read_bytes() == good
    other = next(name for name in before if name.split("/")[1] != file.split("/")[0])
    assert states(run)[other] == before[other]


@pytest.mark.parametrize("change", ["verify", "sha256", "bytes", "refit", "frozen_identity", "model", "missing"])
def test_whatever_speaks_against_an_entry_has_its_file_written_again(
    run: Path, resume: Resume, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = read(run / "report.json")
    entry = report["exports"][1]
    if change == "verify":
        entry["verify"]["ok"] = False
    elif change == "model":
        (run / "model" / "LICENSE").write_text("as the parent's", encoding="utf-8")
    elif change == "missing":
        (run / entry["path"]).unlink()
    elif change == "frozen_identity":
        del entry[change]  # as in reports of earlier versions
    else:
        entry[change] = {"sha256": "0" * 64, "bytes": 1, "refit": {"folder": "x"}}[change]
    write_json(run / "report.json", report)
    written: list[str] = []
    honest = delivery.export_model

    def noted(frozen: FrozenModel, target: str, path: Path, **options: Any) -> dict[str, Any]:
        written.append(target)
        return honest(frozen, target, path, **options)

    monkeypatch.setattr(delivery, "export_model", noted)
    status, _, err = resume()
    assert status == 0, err
    assert written == (["hf", "gguf:q4_0"] if change == "model" else ["gguf:q4_0"])
    again = read(run / "report.json")["exports"][1]
    assert again["verify"]["ok"] is True and again["sha256"] == delivery.digest(run / again["path"])


# --- what the report says --------------------------------------------------------------------------------------------


def test_the_target_of_the_report_is_the_one_whose_bits_stand_there(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = ("quantize", toy_parent, "--data", toy_text, "--out", run, "--recipe", "round_to_nearest", *QUICK)
    words += ("--target", "gguf:q4_0", "--target", "hf", "--resume")
    deliver = delivery.deliver

    def refuses(*arguments: Any) -> dict[str, Any]:
        if arguments[2] == "gguf:q4_0":
            raise ExportError(f"{tmp_path}/x: a scale is <not> exact")
        return deliver(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("hestia.pipeline.run.deliver", refuses)
        assert invoke(*words)[0] == 2
    report = read(run / "report.json")
    assert report["target"] == "hf" == report["exports"][0]["target"]
    assert report["bits_per_weight"]["quantized_layers"] < 4
    assert report["refused"] == {"gguf:q4_0": f"{tmp_path}/x: a scale is <not> exact"}
    page, card = ((run / name).read_text(encoding="utf-8") for name in ("report.html", "README.md"))
    assert f'<dt class="doubtful">gguf:q4_0</dt><dd>not written: {tmp_path}/x: a scale is &lt;not&gt; exact' in page
    assert "Asked for but not written: gguf:q4_0" in card and str(tmp_path) not in card
    status, out, _ = invoke("report", run)
    assert status == 0 and f"gguf:q4_0: NOT WRITTEN ({tmp_path}/x: a scale is <not> exact)" in out

    status, _, err = invoke("export", run, "--to", "gguf:q4_0", "--out", tmp_path / "a.gguf")  # it can be, after all
    assert status == 0, err
    assert "refused" not in read(run / "report.json")
    assert invoke(*words)[0] == 0
    assert read(run / "report.json")["target"] == "gguf:q4_0"


@pytest.mark.parametrize("why", ["a lock that cannot be opened", "busy"])
def test_an_export_from_a_run_that_cannot_be_written_to_is_still_a_success(
    invoke: Invoke, run: Path, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "busy":

        def held(*_: Any, **__: Any) -> None:
            raise BusyError(f"{run}: in use by process 7")

        monkeypatch.setattr(delivery, "locked", held)
    else:
        (run / ".lock").unlink(missing_ok=True)
        (run / ".lock").mkdir()  # for root, too, who may write everywhere
    before = (run / "report.json").read_bytes()
    path = tmp_path / "a.gguf"
    status, out, err = invoke("export", run, "--to", "gguf:q4_0", "--out", path)
    assert status == 0, err
    assert "written and verified; not entered into the run's report: " in out
    assert path.is_file() and (run / "report.json").read_bytes() == before
    status, out, err = invoke("export", run, "--to", "gguf:q4_0", "--out", tmp_path / "b.gguf", "--json")
    record = json.loads(out)
    assert status == 0 and record["verify"]["ok"] is True and record["not_recorded"]

    def differs(*_: Any) -> None:
        raise VerifyError("one weight differs")

    monkeypatch.setattr(delivery, "require_ok", differs)
    assert invoke("export", run, "--to", "gguf:q4_0", "--out", tmp_path / "c.gguf")[0] == 3


# --- what a file says of its parent ----------------------------------------------------------------------------------


def test_files_of_a_run_and_later_ones_name_the_same_parent(
    invoke: Invoke, toy_text: Path, tmp_path: Path, lean: None
) -> None:
    parent, run = make_parent(tmp_path / "Toy-100K-Instruct"), tmp_path / "run"
    (parent / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    words = ("quantize", parent, "--data", toy_text, "--out", run, "--recipe", "round_to_nearest", *QUICK)
    status, _, err = invoke(*words, "--target", "gguf:q4_0")
    assert status == 0, err
    (own,) = (run / "exports" / "gguf-q4_0").iterdir()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(own).fields.items()}
    assert fields["general.name"] == fields["general.base_model.0.name"] == "Toy-100K-Instruct"
    assert (fields["general.basename"], fields["general.size_label"]) == ("Toy", "100K")
    assert fields["general.license"] == "mit"
    assert "general.base_model.0.repo_url" not in fields
    status, _, err = invoke("export", run, "--to", "gguf:q4_0", "--out", tmp_path / "later.gguf")
    assert status == 0, err
    assert (tmp_path / "later.gguf").read_bytes() == own.read_bytes()


def test_only_what_comes_from_the_hub_has_an_address() -> None:
    record = {"name": "org/Model-1B", "commit": "0" * 40}
    assert delivery._parent(record, "mit") == Parent("Model-1B", "org/Model-1B", "mit")
    assert delivery._parent({**record, "commit": None}, None) == Parent("Model-1B")
    assert delivery._parent({"name": "gpt2", "commit": "0" * 40}, None) == Parent("gpt2")
    assert delivery._parent(None, "mit") is delivery._parent({"name": ""}, "mit") is None
    assert os.fsencode(delivery._parent({"name": "\ud800"}, None).name) == b"?"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("primary", "signed", "low", "told"),
    [
        ("trace", False, 1.0, 2.0),
        ("trace", True, -1.0, 3.0),
        ("kl:ternary", False, 1.0, None),
        ("eigenvalue", True, 1.0, None),
    ],
)
def test_a_refit_expects_its_loss_from_a_trace_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, primary: str, signed: bool, low: float, told: float | None
) -> None:
    """Of a signed estimate what scores use: the Gauss-Newton value where its interval is not positive."""
    tensor = SimpleNamespace(trace=2.0, value=3.0 if low <= 0.0 else 2.0, signed=signed)
    found = SimpleNamespace(primary=primary, tensors={"a": tensor})
    monkeypatch.setattr(delivery.curvature.Sensitivity, "load", lambda path: found)
    given: list[Any] = []
    monkeypatch.setattr(delivery, "refit_scales", lambda frozen, target, traces, text: given.append(traces))
    export_and_verify(FrozenModel(run), "hf", run / "again", fallback=False, refit=True)
    assert given == [None if told is None else {"a": told}]
