"""Estimates held against hand counts, against whole models, and against a run that was really made."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import Invoke
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM

import hestia
from hestia import loading
from hestia.cli.estimate import less_memory
from hestia.errors import ConfigError, ExportError
from hestia.estimate import pretend as module
from hestia.estimate.files import _quantized
from hestia.estimate.live import LiveBytes
from hestia.estimate.machine import memory_of, probe, quantity
from hestia.estimate.memory import Stage
from hestia.estimate.pretend import Step, pretend
from hestia.estimate.whole import Layout, estimate, memory
from hestia.options import Options
from hestia.plans import Plan
from hestia.targets import target
from hestia.training import Distillation
from hestia.training.teacher import HeadInput, Teacher, plain_head

GIVEN = ("--memory", "1G", "--disk", "1G", "--flops", "1T", "--bandwidth", "10G")


def config(layers: int) -> Any:
    return LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip


def test_live_bytes_are_counted_once_and_for_as_long_as_they_live() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(1000)
        assert live.now == 4000
        y = x.view(10, 100)[2:]
        assert live.now == 4000
        z = y + 1.0
        assert (live.now, live.peak) == (4000 + 3200, 7200)
        del x, y
        assert live.now == 3200
        assert live.restart() == 7200 and live.peak == 3200
        z.add_(1.0)
        assert live.peak == 3200
        before = live.moved
        z * 2.0
        assert live.moved - before == 2 * 3200
        torch.empty(1000).to(z.device)  # where a tensor lies is asked, and moves nothing
        assert live.moved - before == 2 * 3200 + 4000


def test_a_training_step_holds_what_its_equation_says() -> None:
    """One linear layer by hand: its input is kept, its gradient is made; nothing else is larger."""
    with FakeTensorMode(), LiveBytes() as live:
        layer = torch.nn.Linear(64, 32, bias=False)
        x = torch.empty(8, 64)
        base = live.now
        layer(x).sum().backward()
        assert live.now - base == 4 * 64 * 32
        assert live.peak - base == 4 * 64 * 32 + 2 * 4, "the output died in the sum; loss and its gradient are a number"


@pytest.mark.parametrize(
    "step", [{"training": True}, {"training": True, "teacher": config(2)}, {"calibrating": True}, {}]
)
def test_two_short_models_tell_of_a_long_one(step: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    long = config(9)
    plan = hestia.plan(loading.empty_model(loading.Source("toy", "toy"), long), "hestia")
    asked = Step(batch=2, tokens=16, plan=None if step.get("calibrating") else plan, **step)
    drawn = pretend(long, asked)
    monkeypatch.setattr(module, "MORE", 9)
    whole = pretend(long, asked)
    for name, value in vars(whole).items():
        assert vars(drawn)[name] == pytest.approx(value, rel=1e-3), name


def test_checkpointing_and_frozen_embeddings_hold_less() -> None:
    def peak(**options: bool) -> int:
        return pretend(config(4), Step(batch=4, tokens=64, training=True, **options)).peak

    assert peak(checkpointing=True) < 0.9 * peak()
    assert peak(train_embeddings=False) < peak()


def test_what_checkpointing_recomputes_is_gone_after_its_block() -> None:
    """Each further block holds its gradients and its input, and none of its activations."""
    few, more = (pretend(config(n), Step(batch=64, tokens=64, training=True, checkpointing=True)) for n in (3, 6))
    block = LlamaForCausalLM(config(1)).model.layers[0]
    gradients, inputs = 4 * sum(p.numel() for p in block.parameters()), 4 * 64 * 64 * 32
    assert more.blocks - few.blocks <= 3 * (gradients + inputs)
    assert more.flops > 1.5 * few.flops > 0


def test_flops_are_those_of_torchs_own_counter() -> None:
    model, ids = LlamaForCausalLM(config(2)), torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as theirs:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    with LiveBytes() as ours:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert ours.flops == theirs.get_total_flops() > 0


@pytest.mark.parametrize(("key_heads", "bf16", "fused"), [(1, False, False), (8, False, True), (1, True, True)])
def test_in_fp32_cuda_has_no_fused_kernel_for_grouped_queries(key_heads: int, bf16: bool, fused: bool) -> None:
    given = config(3)
    given.num_attention_heads, given.num_key_value_heads = 8, key_heads
    given.head_dim = 4
    asked = Step(batch=1, tokens=256, training=True, bf16=bf16)
    on_cpu, on_gpu = (pretend(given, dataclasses.replace(asked, device=device)).held for device in ("cpu", "cuda"))
    probabilities = 3 * 8 * 4 * 256**2  # of three blocks, eight heads, in fp32
    assert on_gpu == on_cpu if fused else on_gpu - on_cpu == pytest.approx(probabilities, rel=0.2)


def test_gradients_of_earlier_micro_batches_are_counted(toy_parent: Path) -> None:
    def training(accumulation: int) -> Stage:
        shape = {"batch_size": 4 * accumulation, "seq_len": 32, "steps": 2, "teacher": "none", "recipe": "hestia"}
        options = Options(model=str(toy_parent), accumulation=accumulation, calibrate=2, **shape)
        return next(stage for stage in memory(options) if stage.name == "train")

    once, again = training(1), training(2)
    assert once.note == again.note == "", "the step decides, not the evaluation in between"
    more = again.parts["gradients"] + again.parts["activations"] - once.parts["gradients"] - once.parts["activations"]
    assert 0 < more <= again.parts["optimizer"] / 2, "four bytes a trained parameter at most"


def test_a_gpu_that_is_not_here_is_reckoned_for_by_its_speeds(
    invoke: Invoke, toy_parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = ("estimate", toy_parent, "--steps", "8", "--seq-len", "32", "--device", "cuda")
    status, out, err = invoke(*asked, *GIVEN)
    assert (status, err) == (0, "") and "fits" in out
    status, _, err = invoke(*asked, "--memory", "80G", "--flops", "400T")
    assert status == 2 and "give --flops and --bandwidth" in err
    status, out, _ = invoke(*asked, "--flops", "400T", "--bandwidth", "2T")
    assert status == 0 and "give --memory" in out, "what is free here says nothing of a GPU elsewhere"


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_with_a_teacher_holds_what_a_real_one_does(bf16: bool) -> None:
    """The same bytes counted on real tensors, in the real loss with all its pieces; 4,096 tokens, 4,096 words."""
    shape, words = (64, 64), 4096
    given = config(2)
    given.vocab_size = words
    model, teacher = LlamaForCausalLM(given), Teacher(LlamaForCausalLM(given), bf16=bf16)
    ids = torch.zeros(shape, dtype=torch.long)
    teacher.answer(ids[:1, :4])  # whether its head is plain is tried once
    head: Any = model.get_output_embeddings()
    dtype = torch.bfloat16 if bf16 else None
    with LiveBytes() as live:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16), HeadInput(head) as spared:
            model(input_ids=ids, use_cache=False)
            kept = spared.kept
        assert kept is not None
        answer = teacher.answer(ids)
        answering = live.restart()
        loss = Distillation(weight=1.0).loss_through_head(
            kept.flatten(0, 1), head.weight, ids.flatten(), answer, dtype=dtype
        )
        del kept
        loss.backward()
    asked = Step(batch=shape[0], tokens=shape[1], bf16=bf16)
    step = pretend(given, dataclasses.replace(asked, training=True, teacher=given))
    mask = 4 * 64 * 64 * 64  # transformers makes the causal mask where it cannot ask whether it is needed
    assert step.peak == pytest.approx(live.peak + mask, rel=0.02)
    assert step.peak < 4 * 64 * 64 * words, "the logits alone, in fp32"
    teaching = pretend(given, dataclasses.replace(asked, teaching=True))
    assert max(step.forward, step.held + teaching.peak) == pytest.approx(answering + 2 * mask, rel=0.02)


@pytest.mark.parametrize(
    "given",
    [
        config(2),
        Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=16),
        GraniteConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, logits_scaling=2.0),
    ],
    ids=["llama", "gemma2: a soft cap", "granite: a scale"],
)  # fmt: skip
def test_heads_are_spared_as_in_training(given: Any) -> None:
    model = AutoModelForCausalLM.from_config(given).eval()
    tried = plain_head(model, torch.arange(4)[None])
    assert module.spares_head(model) is (tried is not None) is (given.model_type == "llama")
    asked = Step(batch=8, tokens=16, training=True, teacher=given)
    assert pretend(given, asked).peak > 0


def test_files_of_a_real_run(toy_run: Path, toy_parent: Path) -> None:
    plan = Plan.load(toy_run / "plan.json")
    made = {entry["target"]: entry for entry in json.loads((toy_run / "report.json").read_text())["exports"]}
    found = estimate(
        Options(model=str(toy_parent), steps=8, batch_size=4, seq_len=32, calibrate=2, target=("hf", "gguf:q4_0")),
        memory="1G",
        disk="1G",
        flops="1T",
        bandwidth="10G",
    )
    sizes = {row.target: row for row in found.files}
    for name, entry in made.items():
        assert _quantized(target(name), plan.layers, torch.float32, fallback=False) == entry["quantized_bytes"]
        assert sizes[name].bytes == pytest.approx(entry["bytes"], rel=0.1), "the tokenizer of 320 tokens is a tenth"
    assert sizes["gguf:q1_0"].bytes is None and "ternary" in sizes["gguf:q1_0"].refusal
    frozen = sum(f.stat().st_size for f in (toy_run / "model").glob("*.safetensors"))
    assert found.folder["frozen model"] == pytest.approx(frozen, rel=0.05)
    assert found.folder["codes"] == pytest.approx((toy_run / "codes.safetensors").stat().st_size, rel=0.05)
    checkpoint = next(iter(sorted((toy_run / "checkpoints").iterdir())))
    tensors = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    assert found.folder["checkpoints"] == pytest.approx(3 * tensors, rel=0.1)


def test_formats_that_cannot_hold_such_a_model_are_named(parent_copy: Path) -> None:
    config = json.loads((parent_copy / "config.json").read_text())
    (parent_copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    options = Options(model=str(parent_copy), steps=8, batch_size=4, seq_len=32)
    with pytest.raises(ExportError, match=r"--target gguf:q4_0: .*relu"):
        estimate(
            dataclasses.replace(options, target=("gguf:q4_0",)), memory="1G", disk="1G", flops="1T", bandwidth="10G"
        )
    found = estimate(options, memory="1G", disk="1G", flops="1T", bandwidth="10G")
    sizes = {row.target: row for row in found.files}
    assert sizes["hf"].bytes is not None
    assert sizes["gguf:q4_0"].bytes is None and "relu" in sizes["gguf:q4_0"].refusal


def test_a_dense_fp32_file_holds_its_embedding_in_fp32(parent_copy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(parent_copy, dtype=torch.bfloat16)
    model.save_pretrained(parent_copy)
    options = Options(model=str(parent_copy), steps=8, batch_size=4, seq_len=32)
    found = estimate(options, memory="1G", disk="1G", flops="1T", bandwidth="10G")
    size = next(row.bytes for row in found.files if row.target == "gguf:f32")
    assert size is not None and size >= 4 * sum(p.numel() for p in model.parameters())


def test_the_command_prints_and_writes_json(invoke: Invoke, toy_parent: Path) -> None:
    arguments = ("estimate", toy_parent, "--steps", "8", "--seq-len", "32", "--batch-size", "4", *GIVEN)
    status, out, err = invoke(*arguments)
    assert (status, err) == (0, "")
    assert "calibrate" not in out, "the default recipe reads no curvature"
    for word in ("train", "score", "export", "pilot", "total", "gguf:tq2_0", "fits", "run folder"):
        assert word in out, word
    status, out, _ = invoke(*arguments, "--json")
    record = json.loads(out)
    assert record["schema"] == 1 and record["fits"] == {"memory": True, "disk": True}
    assert record["peak_bytes"] == max(stage["bytes"] for stage in record["memory"])
    assert all(stage["bytes"] == sum(stage["parts"].values()) for stage in record["memory"])
    assert record["job"]["training_tokens"] == 8 * 4 * 32
    assert record["seconds"]["pilot"] > record["seconds"]["train"] > 0  # eight steps: the pilot is longer than the run


@pytest.mark.parametrize(
    ("asked", "calibrated"),
    [
        ({}, False),
        ({"recipe": "hestia"}, True),
        ({"recipe": "hestia", "calibrate": 0}, False),
        ({"bits": 1.9}, True),
        ({"max_kl": 0.1}, True),
        ({"recipe": "hestia", "sensitivity": "sensitivity.json"}, False),
    ],
    ids=str,
)
def test_calibration_is_counted_where_the_run_calibrates(
    asked: dict[str, Any], calibrated: bool, toy_parent: Path, toy_run: Path
) -> None:
    if "sensitivity" in asked:
        asked = {**asked, "sensitivity": str(toy_run / "sensitivity.json")}
    options = Options(model=str(toy_parent), steps=8, batch_size=4, seq_len=32, **asked)
    found = estimate(options, memory="1G", disk="1G", flops="1T", bandwidth="10G")
    assert ("calibrate" in {stage.name for stage in found.stages}) is calibrated
    assert ("calibrate" in found.seconds) is calibrated
    assert found.job.sequences == (256 if calibrated else 0)


def test_a_budget_without_a_sensitivity_is_said_to_be_reckoned_at_one_width(invoke: Invoke, toy_parent: Path) -> None:
    words = ("estimate", toy_parent, "--steps", "8", "--seq-len", "32", "--batch-size", "4", *GIVEN)
    _, out, _ = invoke(*words, "--bits", "1.9", "--target", "gguf:mixed")
    assert "all at 2 bits here" in out
    _, out, _ = invoke(*words, "--max-kl", "0.1", "--target", "gguf:mixed", "--json")
    assert json.loads(out)["alike"] == 1.58
    _, out, _ = invoke(*words, "--bits", "2")
    assert "bits here" not in out


def test_processes_on_a_processor_share_its_memory(toy_parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hestia.estimate.whole.memory_of", lambda device: 8 * 10**9)
    options = Options(model=str(toy_parent), steps=8, batch_size=4, seq_len=32, device="cpu")

    def there(processes: int, memory: str | None = None) -> tuple[int | None, bool | None]:
        layout = Layout(processes=processes)
        found = estimate(options, layout, memory=memory, disk="1G", flops="1T", bandwidth="10G")
        return found.machine.memory, found.fits_memory

    peak = estimate(options, Layout(processes=2), memory="1G", disk="1G", flops="1T", bandwidth="10G").peak
    assert there(1) == (8 * 10**9, True)
    assert there(2) == (4 * 10**9, True)
    assert there(2, memory="8G")[0] == 8 * 10**9
    monkeypatch.setattr("hestia.estimate.whole.memory_of", lambda device: 2 * peak - 2)
    assert there(2)[1] is False


def test_only_what_an_export_carries_is_counted(parent_copy: Path) -> None:
    def sizes() -> dict[str, int | None]:
        options = Options(model=str(parent_copy), steps=8, batch_size=4, seq_len=32, calibrate=2)
        found = estimate(options, memory="1G", disk="1G", flops="1T", bandwidth="10G")
        return {row.target: row.bytes for row in found.files if row.target in ("hf", "mlx")}

    before = sizes()
    for name in ("original/consolidated.00.pth", "pytorch_model.bin", ".git/pack", "README.md"):
        (parent_copy / name).parent.mkdir(exist_ok=True)
        (parent_copy / name).write_bytes(bytes(100_000))
    assert sizes() == before
    (parent_copy / "LICENSE").write_bytes(bytes(1000))
    assert sizes() == {name: size + 1000 for name, size in before.items() if size is not None}


def test_a_configuration_alone_is_enough(invoke: Invoke, toy_parent: Path, tmp_path: Path) -> None:
    alone = tmp_path / "only.json"
    alone.write_text((toy_parent / "config.json").read_text())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(alone.read_text())
    for model in (alone, folder):
        status, out, err = invoke("estimate", model, "--calibrate", "0", "--json", *GIVEN)
        assert status == 0, err
        assert json.loads(out)["parameters"] > 0
    status, _, err = invoke("estimate", tmp_path, *GIVEN)
    assert status == 2 and "no config.json" in err


def test_what_does_not_fit_is_said(invoke: Invoke, toy_parent: Path) -> None:
    status, out, _ = invoke("estimate", toy_parent, "--steps", "8", *GIVEN[2:], "--memory", "1M")
    assert status == 0
    assert "DOES NOT FIT" in out and "--gradient-checkpointing" in out
    assert "which is not enough: weights, optimizer and gradients alone take" in out


def test_what_would_take_less_memory_is_what_is_not_done_yet(toy_parent: Path) -> None:
    def ways(processes: int = 1, **asked: Any) -> str:
        options = Options(model=str(toy_parent), steps=8, batch_size=64, seq_len=64, **asked)
        found = estimate(options, Layout(processes=processes), memory="1M", disk="1G", flops="1T", bandwidth="10G")
        assert max(found.stages, key=lambda stage: stage.peak).name == "train"
        return ", ".join(less_memory(found, options))

    assert ways() == (
        "--accumulation up to 64 (now micro-batches of 64 blocks), --gradient-checkpointing, --embeddings freeze, "
        "--teacher none, --seq-len under 64"
    )
    done = ways(accumulation=64, gradient_checkpointing=True, embeddings="freeze", teacher="none")
    assert done == "--seq-len under 64"
    assert "--accumulation up to 32" in ways(2) and "--fsdp" in ways(2)


def test_more_processes_hold_less_of_a_sharded_model(toy_parent: Path) -> None:
    def train(layout: Layout) -> dict[str, int]:
        options = Options(model=str(toy_parent), steps=8, batch_size=4, seq_len=32, calibrate=0)
        found = estimate(options, layout, memory="1G", disk="1G", flops="1T", bandwidth="10G")
        return {name: n for stage in found.stages if stage.name == "train" for name, n in stage.parts.items()}

    two, four = train(Layout(processes=2, sharded=True)), train(Layout(processes=4, sharded=True))
    assert two["optimizer"] == pytest.approx(2 * four["optimizer"], abs=2)
    assert "buckets" in train(Layout(processes=2)) and "buckets" not in two
    with pytest.raises(ConfigError, match="--batch-size 4 cannot be shared out evenly between 3 processes"):
        train(Layout(processes=3))
    with pytest.raises(ConfigError, match="--processes must be at least 1, got 0"):
        Layout(processes=0)


@pytest.mark.parametrize("text", ["", "lots", "-3G", "0", "nan", "inf", "12 apples"])
def test_a_bad_quantity_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--memory must be a positive number such as 24GiB"):
        quantity(text, "memory")


def test_calibration_and_scores_take_their_time_in_fp32(toy_parent: Path) -> None:
    def found(precision: str) -> Any:
        options = Options(model=str(toy_parent), recipe="hestia", teacher=None, precision=precision)
        return estimate(options, flops="8T", bandwidth="1000P")

    exact, fast = found("fp32"), found("bf16")
    assert (exact.machine.exact, fast.machine.exact) == (8e12, 1e12)
    for stage in ("calibrate", "score"):
        assert fast.seconds[stage] == pytest.approx(8 * exact.seconds[stage], rel=0.01)
    assert fast.seconds["train"] == pytest.approx(exact.seconds["train"], rel=0.01)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_probe_measures_something(bf16: bool) -> None:
    flops, exact, bandwidth = probe(torch.device("cpu"), bf16=bf16)
    assert 1e8 < flops < 1e15 and 1e8 < exact < 1e15 and 1e7 < bandwidth < 1e13
    assert (flops == exact) != bf16
    there = memory_of(torch.device("cpu"))
    assert there is None or there > 1 << 20


def test_a_step_is_reckoned_the_same_every_time(toy_parent: Path) -> None:
    """Whatever was pretended before, and whenever Python collects its garbage."""
    options = Options(model=str(toy_parent), teacher="parent", precision="bf16", batch_size=2, seq_len=32, device="cpu")
    first = [stage.to_json() for stage in memory(options)]
    assert all([stage.to_json() for stage in memory(options)] == first for _ in range(2))


def test_text_importance_and_candidates_are_counted(toy_parent: Path) -> None:
    given = {"memory": "1G", "disk": "1G", "flops": "1T", "bandwidth": "10G"}

    def of(**options: Any) -> Any:
        shape = {"seq_len": 32, "batch_size": 4, "device": "cpu", "teacher": "none"}
        return estimate(Options(model=str(toy_parent), **shape, **options), **given)

    short, long = of(tokens="100k", recipe="bitnet_ste"), of(tokens="10M", recipe="bitnet_ste")
    grown = long.folder["text"] - short.folder["text"]
    assert grown == pytest.approx(5 * 1.1 * 9.9e6, rel=0.01)
    weighted, free = of(recipe="quasar"), of(recipe="bitnet_ste")
    held = 4 * weighted.quantized
    assert weighted.folder["checkpoints"] - free.folder["checkpoints"] == 3 * held
    train = {name: next(s for s in e.stages if s.name == "train") for name, e in (("w", weighted), ("f", free))}
    assert train["w"].parts["importance"] == held and train["w"].peak - train["f"].peak > held
    one, five = of(recipe="hestia"), of(recipe="hestia", widths=("1", "1.58", "2", "3", "4"))
    parts = [next(s for s in e.stages if s.name == "calibrate").parts["candidates"] for e in (one, five)]
    assert parts == [one.quantized, 5 * five.quantized]
    groups = of(recipe="bitnet_ste", group_size="32").folder["codes"] - of(recipe="bitnet_ste").folder["codes"]
    rows = hestia.plan(LlamaForCausalLM.from_pretrained(toy_parent), "bitnet_ste").layers.values()
    assert groups == 4 * sum(layer.shape[0] * (layer.shape[1] // 32 - 1) for layer in rows)
    with pytest.raises(ConfigError, match="--estimator hutchpp: its cost is not reckoned; that of gnb and fisher is"):
        of(recipe="hestia", estimator="hutchpp")
    of(recipe="bitnet_ste", estimator="hutchpp")  # which measures nothing
