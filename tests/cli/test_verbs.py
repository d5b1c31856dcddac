"""Every verb once, on a finished toy run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toy_runs import QUICK, Invoke

from hestia import loading
from hestia.cli.compare import differences
from hestia.cli.export import summary
from hestia.cli.main import main
from hestia.cli.shared import options_from
from hestia.evaluation import paired_difference
from hestia.evaluation.comparison import Comparison
from hestia.files import sha256
from hestia.options import PLANNING
from hestia.plans import Plan

ESTIMATED = ("--memory", "1G", "--disk", "1G", "--flops", "1T", "--bandwidth", "10G", "--json")


def one_object(out: str) -> dict[str, object]:
    """Standard output as the one JSON object that it must be."""
    record = json.loads(out)
    assert isinstance(record, dict)
    assert len(out.strip().splitlines()) == 1
    return record


def test_calibrate_writes_what_plan_reads(
    invoke: Invoke, toy_parent: Path, toy_text: Path, toy_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "sensitivity.json"
    words = ("calibrate", toy_parent, "--data", toy_text, "--calibrate", "3", "--seq-len", "32", "--out", out)
    status, text, _ = invoke(*words)
    assert status == 0
    assert "model.layers.1.mlp.down_proj" in text
    assert f"written to {out}" in text
    assert out.with_suffix(".svg").read_text(encoding="utf-8").count("<title>") == 14
    assert out.with_suffix(".safetensors").is_file()
    status, text, _ = invoke(*words, "--json")
    assert status == 0
    assert one_object(text) == json.loads(out.read_text(encoding="utf-8"))

    status, _, said = invoke("calibrate", toy_parent, "--data", toy_text, "--calibrate", "0", "--out", out)
    assert (status, "--calibrate 0: an interval needs at least 2" in said) == (2, True)

    file = tmp_path / "run.yaml"  # of a run, whose folder is not where these two write
    file.write_text(yaml.safe_dump({"model": str(toy_parent), "data": [str(toy_text)], "seq_len": 32, "out": "RUN"}))
    other = tmp_path / "other.json"
    assert invoke("calibrate", "--config", file, "--calibrate", "3", "--out", other)[0] == 0
    assert json.loads(other.read_text(encoding="utf-8"))["tensors"] == json.loads(out.read_text("utf-8"))["tensors"]
    assert invoke("plan", "--config", file, "--out", tmp_path / "of_file.json")[0] == 0
    assert invoke("plan", toy_parent, "--out", tmp_path / "typed.json")[0] == 0
    assert (tmp_path / "of_file.json").read_bytes() == (tmp_path / "typed.json").read_bytes()

    plan = tmp_path / "plan.json"
    words = ("plan", toy_parent, "--sensitivity", out, "--recipe", "hestia", "--option", "alpha=0.8", "--out", plan)
    status, text, _ = invoke(*words)
    assert status == 0
    assert "14 x" not in text
    assert "model.layers.0.self_attn.q_proj" in text
    assert "kept: embedding" in text
    assert "bits per quantized weight" in text
    made = json.loads(plan.read_text(encoding="utf-8"))
    assert made["recipe"]["alpha"] == 0.8
    factors = {layer["temperature_factor"] for layer in made["layers"].values()}
    assert len(factors) == 14  # every tensor has its own curvature
    status, text, _ = invoke(*words, "--json")
    assert one_object(text) == made


def test_train_follows_its_plan(invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, lean: None) -> None:
    plan = tmp_path / "plan.json"
    assert invoke("plan", toy_parent, "--recipe", "bitnet_ste", "--skip", "*.v_proj", "--out", plan)[0] == 0
    words = [word for word in QUICK if word not in ("--calibrate", "2")]
    run = tmp_path / "run"
    status, out, err = invoke("train", toy_parent, "--plan", plan, "--data", toy_text, "--out", run, *words, "--json")
    assert status == 0, err
    record = one_object(out)
    assert record["recipe"] == "bitnet_ste"
    assert (run / "plan.json").read_bytes() == plan.read_bytes()
    assert not (run / "sensitivity.json").exists()
    frozen = {name.removesuffix(".codes") for name in load_file(run / "codes.safetensors") if name.endswith(".codes")}
    assert len(frozen) == 12
    assert not any("v_proj" in name for name in frozen)

    again = ("train", toy_parent, "--plan", plan, "--data", toy_text, "--out", run, *words, "--resume")
    own = ("train", toy_parent, "--plan", run / "plan.json", "--data", toy_text, "--out", run, *words, "--resume")
    assert invoke(*own)[0] == 0, "the plan is the same, wherever it lies"
    assert invoke("plan", toy_parent, "--recipe", "bitnet_ste", "--out", plan)[0] == 0
    status, _, err = invoke(*again)
    assert status == 2
    assert "holds a different run: plan_sha256 is " in err


def test_a_run_by_a_plan_repeats_from_its_run_yaml(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, lean: None
) -> None:
    """Two bits in groups of 32, some tensors left out: nothing that the defaults would do."""
    plan, run, again = tmp_path / "plan.json", tmp_path / "run", tmp_path / "again"
    words = ("--recipe", "bitnet_ste", "--bits", "2", "--group-size", "32", "--skip", "*.v_proj", "--out")
    assert invoke("plan", toy_parent, *words, plan)[0] == 0
    plan.write_text(json.dumps(json.loads(plan.read_text(encoding="utf-8"))), encoding="utf-8")  # edited by hand
    quick = [word for word in QUICK if word not in ("--calibrate", "2")]
    status, _, err = invoke("train", toy_parent, "--plan", plan, "--data", toy_text, "--out", run, *quick)
    assert status == 0, err
    told = yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))
    assert (told["plan"], told["plan_sha256"]) == (str(plan), sha256(plan))
    assert not set(PLANNING) & set(told)
    status, _, err = invoke("quantize", "--config", run / "run.yaml", "--plan", run / "plan.json", "--out", again)
    assert status == 0, err
    ours, theirs = (load_file(folder / "codes.safetensors") for folder in (run, again))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)

    status, _, err = invoke("quantize", "--config", run / "run.yaml", "--out", tmp_path / "more", "--bits", "3")
    assert status == 2 and "has decided --bits" in err
    assert invoke("plan", toy_parent, "--recipe", "bitnet_ste", "--out", plan)[0] == 0
    status, _, err = invoke("quantize", "--config", run / "run.yaml", "--out", tmp_path / "more")
    assert status == 2 and f"{plan}: not the plan of these options" in err
    assert not (tmp_path / "more").exists()


def test_a_plan_that_falls_back_is_trained_and_exported(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, lean: None
) -> None:
    """Rows of 64 and 128 do not fit TQ2_0's blocks of 256, so that every tensor is stored as another type."""
    plan, run = tmp_path / "plan.json", tmp_path / "run"
    target = ("--target", "gguf:tq2_0", "--group-size", "64")
    assert invoke("plan", toy_parent, *target, "--fallback", "--out", plan)[0] == 0
    quick = [word for word in QUICK if word not in ("--calibrate", "2")]
    words = ("--plan", plan, "--data", toy_text, "--out", run, *quick, "--teacher", "none", "--json")
    status, out, err = invoke("train", toy_parent, *words)
    assert status == 0, err
    (export,) = one_object(out)["exports"]  # type: ignore[misc]
    assert export["verify"]["codes_equal"] is True
    stored = {
        layer["stored"]["gguf:tq2_0"] for layer in json.loads(plan.read_text(encoding="utf-8"))["layers"].values()
    }
    assert stored == {"Q2_0"}
    status, out, err = invoke("estimate", toy_parent, "--plan", plan, *ESTIMATED)
    assert status == 0, err
    sizes = {row["target"]: row["bytes"] for row in one_object(out)["files"]}  # type: ignore[attr-defined]
    assert sizes["gguf:tq2_0"] == pytest.approx(export["bytes"], rel=0.1)


def test_what_an_export_gives_up_is_said(tmp_path: Path) -> None:
    checked = {"engine": None, "notes": ["not run"]}
    entry = {"bytes": 7, "verify": checked, "caution": "not for every engine"}
    assert summary(tmp_path, entry)[1:] == ["not for every engine", "not run"]
    del entry["caution"]
    assert summary(tmp_path, entry)[1:] == ["not run"]


def test_export_then_verify(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    before = sorted(run.rglob("*"))
    path = tmp_path / "toy.gguf"
    status, out, _ = invoke("export", run, "--to", "gguf:q4_0", "--out", path)
    assert status == 0
    assert f"{path}: {path.stat().st_size:,} bytes, codes equal" in out
    assert path.read_bytes() == next((run / "exports" / "gguf-q4_0").iterdir()).read_bytes()
    status, out, _ = invoke("verify", path, "--against", run, "--json", "--no-engine")
    assert status == 0
    assert one_object(out)["codes_equal"] is True
    assert sorted(run.rglob("*")) == before
    assert sorted(tmp_path.iterdir()) == [run, path]
    entries = json.loads((run / "report.json").read_text())["exports"]
    assert [entry["target"] for entry in entries] == ["hf", "gguf:q4_0", "gguf:q4_0"]
    assert entries[2]["path"] == "../toy.gguf" and entries[2]["verify"]["ok"] is True
    assert entries[2]["sha256"] == entries[1]["sha256"] in (run / "README.md").read_text()


def test_a_rounded_head_and_refitted_scales_are_said_everywhere(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    """A run with a scale for every 32 weights does not fit blocks of 64, until it is asked to."""
    from hestia.export.frozen import FrozenModel, save_codes
    from hestia.quant import QuantizedTensor

    run = Path(shutil.copytree(toy_run, tmp_path / "run"))
    frozen = FrozenModel(run)
    fine = {}
    for name in frozen.quantized:
        old = frozen.codes(name)
        scales = old.block_scales(32).clone()
        scales[:, ::2] *= 2
        fine[name] = QuantizedTensor(old.codes, scales, 32)
    tensors = load_file(run / "model" / "model.safetensors")
    tensors |= {f"{name}.weight": new.dense(frozen.dtype) for name, new in fine.items()}
    save_file(tensors, run / "model" / "model.safetensors", metadata={"format": "pt"})
    save_codes(run / "codes.safetensors", fine)
    path = tmp_path / "a.gguf"
    arguments = ("export", run, "--to", "gguf:q2_0", "--out", path, "--head", "q8_0")
    status, _, err = invoke(*arguments)
    assert status == 2
    assert "finer groups of 32 do not fit" in err
    assert not path.exists()
    status, out, err = invoke(*arguments, "--refit")
    assert status == 0, err
    assert "REFITTED: 14 tensors to groups of 64; NLL" in out
    assert "embedding and head are rounded" in out
    entry = json.loads((run / "report.json").read_text())["exports"][-1]
    assert entry["refit"]["nll_change"] is not None and entry["head"]["exact"] is False
    card = (run / "README.md").read_text()
    assert "This file is not the trained model itself: on request 14 tensors got coarser scales" in card
    assert "which rounds:" in card
    status, out, err = invoke("verify", path, "--against", run, "--no-engine")
    assert status == 0, err
    assert "compared with the refitted model" in out or "engine check skipped" in out


def test_verify_without_a_run(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    inside = next((toy_run / "exports" / "gguf-q4_0").iterdir())
    status, out, _ = invoke("verify", inside, "--no-engine")
    assert status == 0 and f"of run {toy_run.name}, codes equal: yes" in out
    path = Path(shutil.copy(inside, tmp_path / "a.gguf"))
    status, out, _ = invoke("verify", path)
    assert status == 0
    assert f"says it is gguf:q4_0 of run '{toy_run.name}', codes " in out
    assert "its blocks have these codes: yes" in out
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    status, out, err = invoke("verify", path, "--json")
    assert status == 3 and one_object(out)["file_matches"] is False
    assert "are not those of run" in err
    status, _, err = invoke("verify", shutil.copytree(toy_run / "exports" / "hf", tmp_path / "hf"))
    assert status == 2 and "--against" in err


def test_the_list_of_targets_knows_the_run(invoke: Invoke, toy_run: Path) -> None:
    status, out, _ = invoke("export", "--list")
    assert status == 0
    assert "gguf:q1_0" in out and "this run" not in out
    status, out, _ = invoke("export", toy_run, "--list", "--json")
    rows = {row["target"]: row for row in one_object(out)["targets"]}
    assert status == 0
    assert rows["gguf:q2_0"]["fits"] is True and rows["gguf:q2_0"]["bits_per_weight"] == 2.25
    assert rows["gguf:tq2_0"]["fits"].startswith("TQ2_0 stores rows in blocks of 256")


def test_the_list_of_targets_asks_whether_the_model_fits_too(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    config = run / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "relu"}))
    status, out, _ = invoke("export", run, "--list", "--json")
    fits = {row["target"]: row["fits"] for row in one_object(out)["targets"]}
    assert status == 0
    assert fits["hf"] is True and "relu" in fits["gguf:q2_0"]


@pytest.mark.parametrize("verb", ["run", "verify", "bench", "eval"])
def test_damaged_files_are_one_line(
    invoke: Invoke, toy_run: Path, toy_held_out: Path, tmp_path: Path, verb: str
) -> None:
    path = tmp_path / "a.gguf"
    data = next((toy_run / "exports" / "gguf-q4_0").iterdir()).read_bytes()
    for content in (data[:5000], b"GGML" + data[4:], data[: len(data) // 2], b""):
        path.write_bytes(content)
        more = {"run": ("--prompt", "a"), "eval": ("--against", toy_run, "--data", toy_held_out)}.get(verb, ())
        status, _, err = invoke(verb, path, *more)
        assert status == 3
        assert err.startswith("hestia: ") and err.count("\n") == 1


def test_verify_of_the_runs_own_hf_export(invoke: Invoke, toy_run: Path) -> None:
    status, out, _ = invoke("verify", toy_run / "exports" / "hf", "--against", toy_run, "--no-engine")
    assert status == 0
    assert "codes equal: yes" in out


@pytest.mark.parametrize("tensor", ["codes", "kept"])
def test_a_flipped_byte_is_found_and_its_tensor_named(
    invoke: Invoke, toy_run: Path, tmp_path: Path, tensor: str
) -> None:
    """The file is found out byte by byte: exit status 3, the tensor in the message, no traceback."""
    import gguf

    path = tmp_path / "toy.gguf"
    shutil.copy(next((toy_run / "exports" / "gguf-q4_0").iterdir()), path)
    name = {"codes": "blk.1.ffn_up.weight", "kept": "output_norm.weight"}[tensor]
    entry = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    content = bytearray(path.read_bytes())
    content[entry.data_offset + 7] ^= 0x20
    path.write_bytes(content)
    status, out, err = invoke("verify", path, "--against", toy_run, "--no-engine")
    assert status == 3
    assert err.startswith("hestia: ")
    assert name in err + out or {"codes": "layers.1.mlp.up_proj", "kept": "model.norm"}[tensor] in err
    assert "Traceback" not in err
    status, out, _ = invoke("verify", path, "--against", toy_run, "--no-engine", "--json")
    assert status == 3
    assert one_object(out)["codes_equal"] is False or tensor == "kept"


def test_a_flipped_byte_of_an_hf_export(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_run / "exports" / "hf", tmp_path / "hf"))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = "model.layers.0.mlp.gate_proj.weight_packed"
    content[8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0] + 5] ^= 1
    path.write_bytes(content)
    status, _, err = invoke("verify", folder, "--against", toy_run, "--no-engine")
    assert status == 3
    assert "model.layers.0.mlp.gate_proj" in err


def test_eval_of_model_run_and_export_against_the_parent(
    invoke: Invoke, toy_run: Path, toy_parent: Path, toy_held_out: Path
) -> None:
    report = json.loads((toy_run / "report.json").read_text(encoding="utf-8"))
    words = ("--data", toy_held_out, "--seq-len", "32", "--json")
    status, out, err = invoke("eval", toy_run, "--against", toy_parent, *words)
    assert status == 0, err
    record = one_object(out)
    assert record["nll"] == pytest.approx(report["nll"]["quantized"], abs=1e-5)
    assert record["kl_to_parent"] == pytest.approx(report["kl_to_parent"], abs=1e-5)
    assert one_object(invoke("eval", toy_parent, *words)[1])["nll"] == pytest.approx(report["nll"]["parent"], abs=1e-5)
    exported = one_object(invoke("eval", toy_run / "exports" / "hf", *words)[1])
    assert exported["nll"] == pytest.approx(report["nll"]["quantized"], abs=1e-5)
    status, out, _ = invoke("eval", toy_run, *words[:-1])
    assert status == 0
    assert "nll: " in out


def test_trust_in_a_models_code_reaches_the_teacher_and_what_is_compared_with(
    invoke: Invoke, toy_parent: Path, parent_copy: Path, toy_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: dict[str, set[bool]] = {}
    read = loading.reading.read

    def reading(source: loading.Source, what: str, reader: Any, **options: Any) -> Any:
        if "trust_remote_code" in options:  # what only fetches a file runs no code
            trusted.setdefault(source.name, set()).add(options["trust_remote_code"])
        return read(source, what, reader, **options)

    monkeypatch.setattr(loading.reading, "read", reading)
    more = ["--data", toy_text, "--seq-len", "32", "--trust-remote-code"]
    assert invoke("eval", toy_parent, "--against", parent_copy, *more, "--eval-tokens", "64")[0] == 0
    assert trusted == {str(toy_parent): {True}, str(parent_copy): {True}}
    trusted.clear()
    words = ["quantize", toy_parent, "--teacher", parent_copy, "--out", tmp_path / "run", *QUICK, "--steps", "1", *more]
    assert invoke(*words)[0] == 0
    assert trusted[str(toy_parent)] == trusted[str(parent_copy)] == {True}


def test_eval_by_the_papers_protocol(invoke: Invoke, toy_run: Path, toy_held_out: Path) -> None:
    status, out, err = invoke("eval", toy_run, "--data", toy_held_out, "--protocol", "hestia", "--json")
    assert status == 0, err
    record = one_object(out)
    assert record["documents"] > 1  # type: ignore[operator]
    assert record["perplexity"] > 1  # type: ignore[operator]


def test_the_papers_documents_are_lines_of_text_and_rows_of_anything_else(
    invoke: Invoke, toy_run: Path, tmp_path: Path
) -> None:
    """A web page of three lines is one document, and so longer than one sequence; a line is never."""
    page = "the cat saw a ball\nthe dog lost a red hat\n\na girl found the river"
    text, pages = tmp_path / "lines.txt", tmp_path / "pages.jsonl"
    text.write_text(page, encoding="utf-8")
    pages.write_text("\n".join(json.dumps({"text": page}) for _ in range(2)), encoding="utf-8")
    words = ("eval", toy_run, "--protocol", "hestia", "--json", "--data")
    assert one_object(invoke(*words, text)[1])["documents"] == 3
    assert one_object(invoke(*words, pages)[1])["documents"] == 2
    assert one_object(invoke(*words, pages, text)[1])["documents"] == 5
    text.write_text("one line\u2028still the same\x0c and so\x85on\nanother line\n", encoding="utf-8")
    assert one_object(invoke(*words, text)[1])["documents"] == 2
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pages.write_text(json.dumps({"messages": chat}), encoding="utf-8")
    status, _, err = invoke(*words, pages)
    assert status == 2 and "holds chats" in err


@pytest.mark.parametrize(
    ("ignored", "flag"),
    [
        (("--against", "parent"), "--against"),
        (("--eval-tokens", "1k"), "--eval-tokens"),
        (("--joiner", "eos"), "--joiner"),
    ],
)
def test_the_papers_protocol_ignores_nothing(
    invoke: Invoke, toy_run: Path, toy_held_out: Path, ignored: tuple[str, str], flag: str
) -> None:
    status, _, err = invoke("eval", toy_run, "--data", toy_held_out, "--protocol", "hestia", *ignored)
    assert status == 2 and f"leave out {flag}" in err
    status, _, err = invoke("eval", toy_run, "--tasks", "some", "--protocol", "hestia")
    assert status == 2 and "--protocol says how --data is scored" in err


def test_compare_report_and_recipes(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    status, out, _ = invoke("compare", toy_run, toy_run)
    assert status == 0
    assert out.count("hestia") >= 2
    assert f"{toy_run} - {toy_run}: +0.0000 [+0.0000, +0.0000] nats per token" in out
    assert "no difference can be claimed" in out
    status, out, _ = invoke("compare", toy_run, toy_run, "--json")
    (difference,) = one_object(out)["differences"]  # type: ignore[misc]
    assert (difference["over"], difference["claimed"], difference["difference"]["mean"]) == ("blocks", False, 0.0)
    two = paired_difference([1.0, 1.1], [2.0, 2.1])
    pair = [Comparison(over="seeds", name="b", reference="a", difference=two, adjusted_p=0.01)]
    assert "no difference can be claimed, which takes 3 seeds of both" in differences(pair)[1]
    copy = Path(shutil.copytree(toy_run, tmp_path / "run"))
    for name in ("report.html", "README.md"):
        (copy / name).unlink()
    status, out, _ = invoke("report", copy)
    assert status == 0
    assert "round_to_nearest" in out
    assert (copy / "report.html").read_text(encoding="utf-8").startswith("<!")
    assert (copy / "README.md").is_file()

    status, out, _ = invoke("recipes")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()} >= {"hestia", "bitnet_ste", "round_to_nearest"}
    status, listed, _ = invoke("recipes", "--json")
    assert [line.split()[0] for line in out.splitlines()] == list(one_object(listed))
    status, told, _ = invoke("recipes", "show", "hestia", "--json")
    assert one_object(told)["options"]["alpha"] == 0.4  # type: ignore[index]
    status, out, _ = invoke("recipes", "show", "hestia")
    assert status == 0
    assert "arXiv:2601.20745" in out
    assert "--option alpha=0.4" in out
    assert "widths: 1, 1.58, 2, 3, 4 bits" in out


def test_compare_tells_settings_apart_by_run_yaml(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    """Two settings of two seeds each, which report.json alone could not tell apart."""
    runs = []
    for name, seed, decay in (("a0", 0, 0.01), ("a1", 1, 0.01), ("b0", 0, 0.1), ("b1", 1, 0.1)):
        run = tmp_path / name
        run.mkdir()
        report = json.loads((toy_run / "report.json").read_text(encoding="utf-8"))
        (run / "report.json").write_text(json.dumps({**report, "seed": seed}), encoding="utf-8")
        told = yaml.safe_load((toy_run / "run.yaml").read_text(encoding="utf-8"))
        (run / "run.yaml").write_text(yaml.safe_dump({**told, "seed": seed, "weight_decay": decay}), encoding="utf-8")
        shutil.copy(toy_run / "scores.json", run)
        runs.append(run)

    def over_seeds() -> list[tuple[str, str]]:
        status, out, err = invoke("compare", *runs, "--json")
        assert status == 0, err
        found = one_object(out)["differences"]
        return [(d["name"], d["reference"]) for d in found if d["over"] == "seeds"]  # type: ignore[attr-defined]

    assert over_seeds() == [(str(tmp_path / "b0"), str(tmp_path / "a0"))]
    (runs[3] / "run.yaml").unlink()
    assert over_seeds() == []


def test_run_needs_a_gguf_file_that_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, status in (("model.bin", b"x", 2), ("missing.gguf", None, 2), ("broken.gguf", b"GGML....", 3)):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        assert main(["run", str(file), "--prompt", "hello"]) == status
        assert name in capsys.readouterr().err


def test_a_run_of_train_is_repeated_by_its_run_yaml(
    invoke: Invoke, toy_run: Path, toy_parent: Path, toy_text: Path, tmp_path: Path
) -> None:
    plan = ("--plan", toy_run / "plan.json")
    first, again = tmp_path / "first", tmp_path / "again"
    words = (
        "--data",
        toy_text,
        "--steps",
        "2",
        "--seq-len",
        "32",
        "--batch-size",
        "2",
        "--lr",
        "3e-3",
        "--threads",
        "1",
    )
    status, _, err = invoke("train", toy_parent, *plan, *words, "--teacher", "none", "--out", first)
    assert status == 0, err
    status, _, err = invoke("train", "--config", first / "run.yaml", "--out", again)
    assert status == 0, err
    a, b = (load_file(run / "codes.safetensors") for run in (first, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert invoke("estimate", "--config", first / "run.yaml", "--flops", "1T", "--bandwidth", "1G")[0] == 0
    for verb, missing in (("train", "--plan is missing"), ("estimate", "MODEL is missing")):
        status, out, err = invoke(verb)
        assert (status, out) == (2, "") and missing in err
    assert not Plan.load(toy_run / "plan.json").falls_back("hf")


def test_a_plan_of_the_cheapest_types_falls_back_on_none(invoke: Invoke, toy_parent: Path, tmp_path: Path) -> None:
    status, _, err = invoke("plan", toy_parent, "--target", "gguf:mixed", "--out", tmp_path / "plan.json")
    assert status == 0, err
    assert not Plan.load(tmp_path / "plan.json").falls_back("gguf:mixed")


def test_what_lies_beside_the_json_is_not_overwritten(
    invoke: Invoke, toy_parent: Path, toy_text: Path, parent_copy: Path, tmp_path: Path
) -> None:
    """``--out MODEL/model.json`` would put the diagonals in the place of the weights."""
    weights = sha256(parent_copy / "model.safetensors")
    words = ("calibrate", parent_copy, "--data", toy_text, "--calibrate", "2", "--seq-len", "32", "--out")
    status, _, err = invoke(*words, parent_copy / "model.json")
    assert status == 2 and "model.safetensors, which would be written beside it, is there already" in err
    assert sha256(parent_copy / "model.safetensors") == weights and not (parent_copy / "model.json").exists()
    (tmp_path / "plan.png").write_bytes(b"a drawing")
    status, _, err = invoke("plan", toy_parent, "--out", tmp_path / "plan.json")
    assert status == 2 and "plan.png, which would be written beside it" in err
    status, _, err = invoke("plan", toy_parent, "--out", tmp_path / "plan.svg")
    assert status == 2 and "the file is JSON; name it" in err
    assert invoke("plan", toy_parent, "--out", tmp_path / "other.json")[0] == 0
    (tmp_path / "other.svg").write_bytes(b"of an earlier plan of this name")
    assert invoke("plan", toy_parent, "--out", tmp_path / "other.json")[0] == 0


def test_recipe_options_are_taken_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": "m", "recipe": "hearth", "options": {"temperature": 0.2, "rho": 0.3}}))
    typed = {"options": ("rho=0.4", "hard_from=0.9")}
    merged = {"temperature": 0.2, "rho": 0.4, "hard_from": 0.9}
    assert options_from(str(file), typed).options == merged
    assert options_from(str(file), {"recipe": "hearth", **typed}).options == merged
    assert options_from(str(file), {"recipe": "hestia", **typed}).options == {"rho": 0.4, "hard_from": 0.9}


def test_a_plan_of_nothing_is_refused_before_anything_is_written(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    assert invoke("plan", toy_parent, "--out", path)[0] == 0
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers": {}}))
    status, _, err = invoke("train", toy_parent, "--plan", path, "--data", toy_text, "--out", tmp_path / "run")
    assert status == 2 and "this one names none" in err and not (tmp_path / "run").exists()


def test_a_bound_without_a_sensitivity_says_what_it_needs(invoke: Invoke, toy_parent: Path, tmp_path: Path) -> None:
    status, _, err = invoke("plan", toy_parent, "--max-kl", "0.3", "--out", tmp_path / "plan.json")
    assert status == 2 and "spend bits tensor by tensor" in err and "does not do" not in err


def test_an_odd_list_of_exports_is_no_traceback(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run, ignore=shutil.ignore_patterns("checkpoints", "cache"))
    record = json.loads((run / "report.json").read_text())
    for odd in (["x"], 5, None):
        (run / "report.json").write_text(json.dumps({**record, "exports": odd}))
        status, _, err = invoke(
            "verify", next((run / "exports").glob("*/*.gguf"), run / "exports" / "hf"), "--against", run
        )
        assert status == 0, err


def test_a_plan_written_over_a_frozen_run_s_own_is_noticed(
    invoke: Invoke, toy_parent: Path, toy_text: Path, tmp_path: Path, lean: None
) -> None:
    """The report would be of that plan, the codes of the other."""
    run = tmp_path / "run"
    words = ("quantize", toy_parent, "--data", toy_text, *QUICK, "--target", "hf", "--out", run)
    assert invoke(*words)[0] == 0
    before = (run / "report.json").read_bytes(), (run / "plan.json").read_bytes()
    assert invoke("plan", toy_parent, "--skip", "*q_proj", "--out", run / "plan.json")[0] == 0
    status, _, err = invoke(*words, "--resume")
    assert status == 2 and "plan.json is not the plan that this run was frozen by" in err
    assert (run / "report.json").read_bytes() == before[0]
    (run / "plan.json").write_bytes(before[1])
    assert invoke(*words, "--resume")[0] == 0
    status, _, err = invoke("plan", run)
    assert status == 2 and f"a run; its frozen model is {run / 'model'}" in err


def test_an_export_has_the_name_that_other_verbs_ask_for(invoke: Invoke, toy_run: Path, tmp_path: Path) -> None:
    for target, name, said in (("gguf:q4_0", "x", "name it NAME.gguf"), ("hf", "x.gguf", "leave out .gguf")):
        status, _, err = invoke("export", toy_run, "--to", target, "--out", tmp_path / name)
        assert status == 2 and said in err and not (tmp_path / name).exists()
