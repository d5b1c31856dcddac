"""The teacher: losses against formulas, gradients against autograd, chunks against the whole, runs against runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
from torch import Tensor, nn
from toy_training import blocks, converted, log_rows, trainer

from hestia.data.noise import noisy
from hestia.errors import ConfigError
from hestia.training import distillation
from hestia.training.distillation import DIVERGENCES, Distillation, head_share
from hestia.training.stream import BlockStream
from hestia.training.teacher import Teacher, hold_in_bf16


def distributions(rows: int = 7, words: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher logits, student logits and labels, of which one is missing."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(rows, words, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(words, (rows,), generator=generator)
    labels[2] = -100
    return teacher, student, labels


def by_the_book(kind: str, teacher: Tensor, student: Tensor, labels: Tensor, weight: float) -> Tensor:
    """One position after the other, one word after the other; autograd does the rest."""
    total = torch.zeros((), dtype=teacher.dtype)
    for t, s, label in zip(teacher, student, labels.tolist(), strict=True):
        if label == -100:
            continue
        p, q = t.softmax(0), s.softmax(0)
        forward = sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))
        reverse = sum(b * (b.log() - a.log()) for a, b in zip(p, q, strict=True))
        if kind == "akl":
            head, mass, head_gap, tail_gap = [], 0.0, 0.0, 0.0
            for word in sorted(range(len(p)), key=lambda w: -float(p[w])):
                mass += float(p[word])
                if not head or mass <= 0.5:
                    head.append(word)
            for word in range(len(p)):
                gap = abs(float(p[word]) - float(q[word].detach()))
                head_gap, tail_gap = (head_gap + gap, tail_gap) if word in head else (head_gap, tail_gap + gap)
            share = head_gap / (head_gap + tail_gap)
            value = share * forward + (1 - share) * reverse
        else:
            value = forward if kind == "forward_kl" else reverse
        total = total + weight * value - (1 - weight) * q[label].log()
    return total / int((labels != -100).sum())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_loss_and_gradient_are_the_formulas_in_any_number_of_chunks(kind: str, weight: float) -> None:
    teacher, student, labels = distributions()
    theirs = student.clone().requires_grad_()
    expected = by_the_book(kind, teacher, theirs, labels, weight)
    expected.backward()
    for positions in (1, 3, 100):
        ours = student.clone().requires_grad_()
        asked: list[int] = []

        def answer(part: slice, asked: list[int] = asked) -> Tensor:
            asked.append(part.stop - part.start)
            return teacher[part]

        loss = Distillation(divergence=kind, weight=weight, positions=positions).loss(ours, labels, answer)
        (2 * loss).backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, 2 * theirs.grad, rtol=1e-9, atol=1e-12)
        assert max(asked) <= positions, "never more logits of the teacher than asked for"
        assert not ours.grad[2].any(), "a position without a label has no part in the loss"


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_pieces_of_a_chunk_add_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two rows, as a large vocabulary makes them, against one of all seven."""
    teacher, student, labels = distributions()
    found = []
    for rows in (len(labels), 2):
        monkeypatch.setattr(distillation, "piece", lambda *_, rows=rows: rows)
        ours = student.clone().requires_grad_()
        loss = Distillation(divergence=kind).loss(ours, labels, lambda part: teacher[part])
        loss.backward()
        found.append((loss.detach(), ours.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 3, 100])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_loss_through_the_head_is_the_loss_of_its_logits(kind: str, positions: int) -> None:
    teacher, student, labels = distributions()
    distill = Distillation(divergence=kind, weight=0.7, positions=positions)
    for head_learns in (True, False):
        hidden = student[:, :5].clone().requires_grad_()
        head = teacher.T[:, :5].clone().requires_grad_(head_learns)
        inputs = [x for x in (hidden, head) if x.requires_grad]
        expected = distill.loss(hidden @ head.T, labels, lambda part: teacher[part])
        gradients = torch.autograd.grad(3 * expected, inputs)
        loss = distill.loss_through_head(hidden, head, labels, lambda part: teacher[part])
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        for ours, theirs in zip(torch.autograd.grad(3 * loss, inputs), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_head_that_is_spared_gets_its_gradient_all_the_same(tmp_path: Path) -> None:
    """Tied and untied, in bf16 and not: the run whose logits exist whole, step by step."""
    for make in (toy_models.llama, toy_models.tied_llama):
        for bf16 in (False, True):
            losses, weights = [], []
            for whole in (True, False):
                model, plan = converted(make)
                folder = tmp_path / f"{make.__name__}-{bf16}-{whole}"
                options = {"distill": Distillation(weight=0.6, positions=5), "teacher": make(), "bf16": bf16}
                run = trainer(folder, model, plan, steps=3, accumulation=2, **options)
                assert run._head_input is not None
                if whole:
                    run._head_input = None
                run.fit()
                losses.append([row["loss"] for row in log_rows(folder) if "loss" in row])
                weights.append(model.get_output_embeddings().weight.detach().clone())
            assert losses[0] == pytest.approx(losses[1], rel=2e-3 if bf16 else 1e-5)
            gap = (weights[0] - weights[1]).abs()  # in bf16 AdamW may step either way where a gradient is all rounding
            assert float(gap.mean() if bf16 else gap.max()) < (1e-3 if bf16 else 1e-5)


@pytest.mark.parametrize(
    "make", [toy_models.llama, toy_models.tied_llama, toy_models.gemma2, toy_models.qwen2_moe, toy_models.gpt2]
)
def test_a_teacher_held_in_bf16_answers_bit_for_bit_the_same(make: Any) -> None:
    """What autocast would round at every use is rounded once; embeddings, tied heads and norms stay as they were."""
    ids = blocks(2, 9).input_ids.long()
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole, halves = Teacher(model, bf16=True), Teacher(held := hold_in_bf16(make()), bf16=True)
    torch.testing.assert_close(halves.answer(ids)(slice(0, 18)), whole.answer(ids)(slice(0, 18)), rtol=0, atol=0)
    assert halves._plain_head is whole._plain_head is (make is not toy_models.gemma2)
    halved = {name for name, p in held.named_parameters() if p.dtype == torch.bfloat16}
    linears = {f"{path}.weight" for path, m in held.named_modules() if type(m) is nn.Linear and path != "lm_head"}
    tied = held.get_output_embeddings().weight is held.get_input_embeddings().weight
    assert halved - {n for n in halved if n.endswith(".bias")} == linears | (set() if tied else {"lm_head.weight"})
    assert all(torch.equal(p, before[name]) for name, p in held.named_parameters() if name not in halved)


def test_a_head_that_is_more_than_a_product_is_not_spared(tmp_path: Path) -> None:
    """A soft cap after the head: the first step's loss is KL(p || q) of the capped logits."""
    model, plan = converted(toy_models.gemma2, rho=0.0)
    teacher = toy_models.gemma2()
    run = trainer(tmp_path, model, plan, steps=1, distill=Distillation(weight=1.0), teacher=teacher)
    assert run._head_input is None
    model.train()
    ids = torch.stack([row["input_ids"] for row in (run.train_dataset[k] for k in range(4))])
    with torch.no_grad():
        p, q = (m(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (teacher.eval(), model))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    run.fit()
    assert [row["loss"] for row in log_rows(tmp_path) if "loss" in row] == pytest.approx([expected], rel=1e-4)


def test_the_teacher_runs_in_the_precision_of_the_student() -> None:
    ids = toy_models.IDS
    low, full = (Teacher(toy_models.llama(), bf16=bf16).answer(ids)(slice(0, 4)) for bf16 in (True, False))
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)


def test_a_student_that_equals_its_teacher_has_no_divergence_and_no_gradient() -> None:
    teacher, _, labels = distributions()
    for kind in DIVERGENCES:
        student = teacher.clone().requires_grad_()
        loss = Distillation(divergence=kind, weight=1.0).loss(student, labels, lambda part: teacher[part])
        loss.backward()
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
        assert student.grad is not None and float(student.grad.abs().max()) < 1e-12
    assert head_share(teacher.softmax(-1), teacher.softmax(-1)).tolist() == [1.0] * 7


def test_extreme_logits_give_finite_losses() -> None:
    teacher = torch.tensor([[0.0, -1e4], [1e4, 0.0]])
    for kind in DIVERGENCES:
        student = torch.tensor([[-1e4, 0.0], [0.0, 0.0]], requires_grad=True)
        loss = Distillation(divergence=kind, weight=0.5).loss(student, torch.tensor([0, 1]), lambda part: teacher[part])
        loss.backward()
        assert bool(torch.isfinite(loss)) and student.grad is not None and bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("make", [toy_models.tied_llama, toy_models.gemma2])
def test_a_teacher_answers_as_the_model_does_whatever_its_head(make: Any) -> None:
    """Gemma 2 caps its logits after the head, so its head alone must not be used."""
    model = make()
    ids = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    teacher = Teacher(model)
    answer = teacher.answer(ids)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.flatten(0, 1)
    for part in (slice(0, 24), slice(3, 9), slice(23, 24)):
        torch.testing.assert_close(answer(part), expected[part], rtol=1e-5, atol=1e-5)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_weight_0_is_the_run_without_a_teacher_and_weight_1_is_not(tmp_path: Path) -> None:
    def losses(name: str, distill: Distillation | None) -> list[float]:
        model, plan = converted()
        teacher = None if distill is None else toy_models.llama()
        run = trainer(tmp_path / name, model, plan, steps=3, accumulation=2, distill=distill, teacher=teacher)
        run.fit()
        return [row["loss"] for row in log_rows(tmp_path / name) if "loss" in row]

    plain = losses("plain", None)
    assert losses("zero", Distillation(weight=0.0)) == pytest.approx(plain, rel=1e-5)
    pure = losses("one", Distillation(weight=1.0))
    assert pure[0] == pytest.approx(0.0, abs=1e-6), "at pressure 0 the student is its teacher"
    assert pure[-1] > 0.0


def test_a_resumed_run_needs_the_same_distillation(tmp_path: Path) -> None:
    model, plan = converted()
    half = Distillation(weight=0.5)
    run = trainer(tmp_path / "a", model, plan, save_every=3, distill=half, teacher=toy_models.llama())
    run.fit()
    others = (Distillation(weight=0.6), Distillation(weight=0.5, divergence="akl"), Distillation(noise=0.1), None)
    for other in others:
        again, plan = converted()
        teacher = None if other is None else toy_models.llama()
        resumed = trainer(tmp_path / "a", again, plan, save_every=3, distill=other, teacher=teacher)
        with pytest.raises(ConfigError, match="another config"):
            resumed.fit(tmp_path / "a" / "checkpoints" / "step-000003")


def test_a_run_of_a_version_without_an_option_goes_on_where_the_option_has_its_default(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "checkpoints" / "step-000003"

    def run(noise: float, checkpoint: Path | None = None) -> None:
        model, plan = converted()
        distill, teacher = Distillation(noise=noise), toy_models.llama()
        trainer(tmp_path / "a", model, plan, save_every=3, distill=distill, teacher=teacher).fit(checkpoint)

    run(0.0)
    state = json.loads((folder / "state.json").read_text())
    config = state["fingerprint"]["config"]
    del config["distill"]["noise"], config["norm_rate"]
    (folder / "state.json").write_text(json.dumps(state))
    run(0.0, folder)
    with pytest.raises(ConfigError, match=r"config.distill.noise is 0.0 there and 0.1 here\. Choose"):
        run(0.1, folder)
    config["retired"] = 1
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"config\.retired is 1 there and null here"):
        run(0.0, folder)


def test_teacher_and_student_read_the_same_noisy_tokens(tmp_path: Path) -> None:
    """Of the same blocks in the same order; the cross entropy is still that of the text."""
    read: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    model, plan = converted()
    teacher = toy_models.llama()
    data, noise = blocks(), 0.3

    def note(who: str) -> Any:
        return lambda module, inputs, kwargs: read[who].append(kwargs["input_ids"])

    model.model.register_forward_pre_hook(note("student"), with_kwargs=True)
    teacher.model.register_forward_pre_hook(note("teacher"), with_kwargs=True)
    run = trainer(
        tmp_path, model, plan, train=data, distill=Distillation(weight=0.5, noise=noise), teacher=teacher, eval_every=0
    )
    batch, examples = run.config.batch_size, run.config.steps * run.config.batch_size
    run.fit()
    student = torch.cat([ids for ids in read["student"] if ids.shape == (batch, data.input_ids.shape[1])])
    taught = torch.cat([ids for ids in read["teacher"] if ids.shape == (batch, data.input_ids.shape[1])])
    assert torch.equal(student, taught) and len(student) == examples
    clean, noisy = BlockStream(data, examples, run.config.seed), run.train_dataset
    changed = 0.0
    for index in range(examples):
        ids = clean[index]["input_ids"]
        assert torch.equal(noisy[index]["input_ids"], student[index])
        assert torch.equal(noisy[index]["labels"], clean[index]["labels"])
        changed += float((student[index] != ids).float().mean()) / examples
    assert changed == pytest.approx(noise * (1 - 1 / 64), abs=0.05), "one in 64 is drawn as it was"


def test_a_noisy_run_that_was_interrupted_ends_the_same(tmp_path: Path) -> None:
    noisy = Distillation(weight=1.0, noise=0.3)

    def run(folder: str, resume: Path | None = None) -> dict[str, Tensor]:
        model, plan = converted()
        trainer(tmp_path / folder, model, plan, save_every=3, distill=noisy, teacher=toy_models.llama()).fit(resume)
        return model.state_dict()

    whole = run("a")
    resumed = run("b", tmp_path / "a" / "checkpoints" / "step-000003")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_bad_distillations_are_refused(tmp_path: Path) -> None:
    model, plan = converted()
    with pytest.raises(ConfigError, match=r"--distill 'forward': did you mean 'forward_kl'"):
        Distillation(divergence="forward")
    with pytest.raises(ConfigError, match=r"--distill-weight must lie in \[0, 1\], got 1.5"):
        Distillation(weight=1.5)
    with pytest.raises(ConfigError, match=r"--distill-noise must lie in \[0, 1\], got nan"):
        Distillation(noise=float("nan"))
    with pytest.raises(ConfigError, match="positions must be 1 or more, got 0"):
        Distillation(positions=0)
    with pytest.raises(ConfigError, match="belong together"):
        trainer(tmp_path / "b", model, plan, distill=Distillation())
    with pytest.raises(ConfigError, match="vocabulary of 65, the student one of 64"):
        trainer(tmp_path / "c", model, plan, distill=Distillation(), teacher=toy_models.llama(vocab_size=65))


def test_a_stream_s_noise_is_keyed_by_the_example_and_not_by_its_row() -> None:
    """72 examples of 24 blocks: in the second round the same block is read with other noise."""
    made = blocks()
    stream, clean = BlockStream(made, 72, 0, noise=0.5, vocabulary=64), BlockStream(made, 72, 0)
    for index in (0, 30, 70):
        assert torch.equal(stream[index]["input_ids"], noisy(clean[index]["input_ids"], 0.5, 64, 0, index))


def test_fp16_logits_lose_no_gradient() -> None:
    """Divided by the labels of a step, in fp16, most of it would be zero before a loss scale reaches it."""
    teacher, _, _ = distributions(64, 500)
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(64, dtype=torch.long)
    found = []
    for dtype in (torch.float32, torch.float16):
        x = student.to(dtype).requires_grad_()
        loss = Distillation(weight=1.0).loss(x, labels, lambda part: teacher[part].float(), 1 << 16)
        (loss * (1 << 16)).backward()
        assert x.grad is not None
        found.append(x.grad.float())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.02
    hidden = torch.randn(64, 8, dtype=torch.float16).requires_grad_()
    head = torch.randn(500, 8).requires_grad_()
    loss = Distillation(weight=1.0).loss_through_head(hidden, head, labels, lambda part: teacher[part].float(), 1 << 16)
    (loss * (1 << 16)).backward()
    assert hidden.grad is not None and float((hidden.grad == 0).float().mean()) < 0.01


@pytest.mark.parametrize("make", [toy_models.llama, toy_models.gemma2])
def test_a_teacher_does_not_look_at_what_is_masked(make: Any) -> None:
    """Padding on the left: the answer is that of the model with the same mask."""
    model, ids = make().eval(), torch.tensor([[0, 0, 0, 3, 1, 4, 1, 5], [3, 1, 4, 1, 5, 9, 2, 6]])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    found = Teacher(model).answer(ids, mask)(slice(0, 16)).view(2, 8, -1)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    unmasked = Teacher(model).answer(ids)(slice(0, 16)).view(2, 8, -1)
    assert float((unmasked - expected)[mask.bool()].abs().max()) > 1e-3


def test_a_teacher_that_answers_by_whole_sequences_runs_each_once() -> None:
    model, ids = toy_models.gemma2(), blocks(3, 16).input_ids.long()
    teacher = Teacher(model)
    expected = teacher.answer(ids)(slice(0, 48))
    rows: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    answer = teacher.answer(ids)
    pieces = [answer(slice(start, min(48, start + 7))) for start in range(0, 48, 7)]
    torch.testing.assert_close(torch.cat(pieces), expected)
    assert rows == [1, 1, 1]
