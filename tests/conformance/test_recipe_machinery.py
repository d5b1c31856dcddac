"""Every recipe works under what a training run is made of: autocast, checkpointing, compilation, data parallelism."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conformance import ONE_WIDTH, TIMES, Case, Perceptron, gradients, logits, loss, move
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from toy_models import qwen2, snapshot, tied_llama

import hestia
from hestia.nn import knobs_of, quantized_modules
from hestia.training.clock import correct, hand_over_importance

# --- autocast and checkpointing ------------------------------------------------------------------------------------


def test_bf16_autocast_multiplies_in_bf16_what_was_quantized_in_fp32(trained: Case) -> None:
    model, _ = trained.converted(t=0.5)
    plain = {path: layer.effective_weight().detach() for path, layer in quantized_modules(model)}

    def cast_loss(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(m)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(model).dtype == torch.bfloat16
        for path, layer in quantized_modules(model):
            assert torch.equal(layer.effective_weight(), plain[path]), path
    exact, cast = gradients(model), gradients(model, cast_loss)
    for name, gradient in cast.items():
        assert gradient.dtype == torch.float32
        likeness = torch.nn.functional.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
        assert likeness > 0.99, f"{name}: {likeness}"


def test_evaluation_under_autocast_is_of_the_frozen_model(case: Case) -> None:
    model, _ = case.converted(t=1.0)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(model)
        hestia.freeze(model)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(trained: Case, reentrant: bool) -> None:
    model, _ = trained.converted(t=0.5)
    plain = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


# --- torch.compile -------------------------------------------------------------------------------------------------


def fifty_steps(case: Case, make: Callable[[], nn.Module], backend: str | None) -> tuple[list[float], int]:
    """Losses of 50 steps while the knobs move from t = 0 to 1, and how many graphs were compiled for them."""
    model, plan = case.converted(make, t=0.0)
    counter = CompileCounterWithBackend(backend or "eager")
    run = torch.compile(model, backend=counter, fullgraph=True) if backend else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for k in range(50):
        move(model, plan, k / 49)
        optimizer.zero_grad()
        value = loss(run) if make is tied_llama else (run(X) - X).square().mean()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses, counter.frame_count


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def one_graph_serves(case: Case, make: Callable[[], nn.Module], backend: str) -> None:
    plain, _ = fifty_steps(case, make, None)
    compiled, graphs = fifty_steps(case, make, backend)
    assert graphs == 1, f"{graphs} graphs for 50 steps"
    assert compiled == pytest.approx(plain, rel=1e-3)
    assert abs(plain[-1] - plain[0]) > 1e-3 * plain[0]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("one", ONE_WIDTH, ids=str)
def test_fifty_steps_of_moving_knobs_compile_once(one: Case) -> None:
    one_graph_serves(one, Perceptron, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_every_width_compiles_once(trained: Case) -> None:
    one_graph_serves(trained, Perceptron, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("one", ONE_WIDTH, ids=str)
def test_a_whole_transformer_compiles_once(one: Case) -> None:
    one_graph_serves(one, tied_llama, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("one", ONE_WIDTH, ids=str)
def test_layers_compiled_one_by_one_share_their_graphs(one: Case) -> None:
    model, plan = one.converted(lambda: tied_llama(num_hidden_layers=10), t=0.0)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.get_submodule("model.layers").children():
        layer.compile(backend=counter)
    for t in TIMES:
        move(model, plan, t)
        loss(model).backward()
    # ten layers of ten different temperature factors: one graph, and one more in which the factor is a variable
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("one", [ONE_WIDTH[0], ONE_WIDTH[-1]], ids=str)
def test_inductor_compiles_once_and_computes_the_same(one: Case) -> None:
    if not inductor_works():
        pytest.skip("no C++ compiler")
    one_graph_serves(one, Perceptron, "inductor")


def inductor_works() -> bool:
    """Whether this machine can compile what inductor writes."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except torch._inductor.exc.InductorError:
        return False
    finally:
        torch.compiler.reset()
    return True


# --- data parallelism ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp_takes_the_same_step(trained: Case) -> None:
    models = [trained.converted(t=0.5)[0] for _ in range(2)]
    wrapped = DistributedDataParallel(models[0])
    assert knobs_of(wrapped) is knobs_of(models[0])
    for model, run in zip(models, (wrapped, models[1]), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loss(run).backward()
        optimizer.step()
    ours, theirs = (dict(model.named_parameters()) for model in models)
    for name, parameter in theirs.items():
        assert torch.equal(ours[name], parameter), name


@pytest.mark.usefixtures("one_process")
def test_fully_shard_takes_the_same_step(trained: Case) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain, _ = trained.converted(t=0.5)
    model = copy.deepcopy(plain)
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    for run in (model, plain):
        optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2)
        loss(run).backward()
        optimizer.step()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), theirs[name]), name
    assert {id(layer.knobs) for _, layer in quantized_modules(model)} == {id(knobs_of(model))}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["cage", "quasar"])
def test_what_the_clock_does_after_a_step_is_the_same_under_fully_shard(name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, plan = Case(name, 1.58).converted(t=1.0)
    model = copy.deepcopy(plain)
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for run in (model, plain):
        optimizer = torch.optim.AdamW(run.parameters(), lr=1e-2)
        loss(run).backward()
        optimizer.step()
        layers = [layer for _, layer in quantized_modules(run)]
        hand_over_importance(layers, optimizer, step=20)
        if plan.correction is not None:
            correct(layers, optimizer, plan.correction, t=0.95)
    for (path, ours), (_, theirs) in zip(quantized_modules(model), quantized_modules(plain), strict=True):
        assert torch.equal(ours.weight.full_tensor(), theirs.weight), path  # type: ignore[operator]
        assert theirs.held is None or torch.equal(ours.held, theirs.held), path  # type: ignore[arg-type]


def _worker(rank: int, folder: str, case: Case) -> None:
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)  # for the other process: a lost one is an error, not ten minutes of silence
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=wait)
    save_file(_two_steps(rank, case), f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


def _two_steps(rank: int, case: Case) -> dict[str, Tensor]:
    """The model after two steps. DDP ends with this call: outliving its group it can wait for the GIL that it holds."""
    model, plan = case.converted(qwen2, t=0.5)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
    for t in (0.5, 0.6):
        move(model, plan, t)
        optimizer.zero_grad()
        loss(wrapped, rows[2 * rank : 2 * rank + 2]).backward()
        optimizer.step()
    return snapshot(model)


@pytest.mark.slow
@pytest.mark.parametrize("one", ONE_WIDTH[-1:], ids=str)
def test_two_processes_take_the_step_of_one_with_both_batches(one: Case, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path), one), nprocs=2)
    model, plan = one.converted(qwen2, t=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
    for t in (0.5, 0.6):
        move(model, plan, t)
        optimizer.zero_grad()
        loss(model, rows).backward()
        optimizer.step()
    ranks = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-4, atol=1e-6)
