"""Nothing of a model is unaccounted for: every parameter is a candidate or kept, once, with the right reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_models import LINEAR, OTHER, gpt2, llama, mixtral, qwen2, qwen2_moe, tied_llama
from transformers import MambaConfig, MambaForCausalLM

import hestia
from hestia.errors import PlanError
from hestia.nn import Selection, select
from hestia.nn.select import ROUTER
from hestia.plans import Kept

EVERY = {**LINEAR, **OTHER}


def reason(selection: Selection, end: str) -> set[str]:
    """The reasons of all kept parameters whose name ends so."""
    return {kept.reason for name, kept in selection.kept.items() if name.endswith(end)}


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_accounted_for_exactly_once(name: str) -> None:
    model = EVERY[name]()
    selection = select(model)
    chosen = [f"{path}.weight" for path in selection.candidates]
    assert not set(chosen) & set(selection.kept)
    assert sorted([*chosen, *selection.kept]) == sorted(n for n, _ in model.named_parameters())
    counted = sum(m.weight.numel() for m in selection.candidates.values())
    counted += sum(kept.weights for kept in selection.kept.values())
    assert counted == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    for path, linear in selection.candidates.items():
        assert model.get_submodule(path) is linear and type(linear) is nn.Linear


@pytest.mark.parametrize("name", LINEAR)
def test_the_linear_layers_of_the_blocks_are_the_candidates(name: str) -> None:
    model = LINEAR[name]()
    selection = select(model)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(selection.candidates) == 2 * len(kinds)
    assert {path.rpartition(".")[2] for path in selection.candidates} == kinds
    assert reason(selection, "norm.weight") == {"norm or vector"}
    assert reason(selection, ".bias") == ({"bias"} if name == "qwen2" else set())
    assert not selection.warnings
    assert selection.coverage() > 0.95


@pytest.mark.parametrize("name", LINEAR)
def test_head_and_embedding_are_kept_and_named_as_what_they_are(name: str) -> None:
    model = LINEAR[name]()
    selection = select(model)
    if model.config.tie_word_embeddings:
        assert reason(selection, "embed_tokens.weight") == {"embedding, tied to the output head"}
        assert "lm_head.weight" not in selection.kept
    else:
        assert reason(selection, "embed_tokens.weight") == {"embedding"}
        assert reason(selection, "lm_head.weight") == {"output head"}


def test_ties_are_tied_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        model = tied_llama()
    assert select(model).kept == select(tied_llama()).kept


@pytest.mark.parametrize(
    ("model", "what", "weights"), [(mixtral, "MixtralExperts", 2 * 4 * 3 * 32 * 64), (gpt2, "Conv1D", 2 * 12 * 32 * 32)]
)
def test_weights_that_are_not_linear_are_kept_loudly(model: object, what: str, weights: int) -> None:
    selection = select(model())  # type: ignore[operator]
    assert f"{weights:,} weights are kept: {what}: not an nn.Linear" in selection.warnings
    assert selection.kept_body()[f"{what}: not an nn.Linear"] == weights
    assert next(iter(selection.kept_body())).startswith(what), "the largest reason comes first"
    assert selection.coverage() < 0.5


def test_routers_and_stacked_experts_are_kept_beside_a_shared_expert_that_is_not() -> None:
    selection = select(qwen2_moe())
    assert "model.layers.0.mlp.shared_expert.up_proj" in selection.candidates
    assert reason(selection, "experts.down_proj") == {"Qwen2MoeExperts: not an nn.Linear"}
    assert reason(selection, "mlp.gate.weight") == {"Qwen2MoeTopKRouter: not an nn.Linear"}


# --- skip patterns -------------------------------------------------------------------------------------------------


def test_a_skip_pattern_keeps_what_it_matches_and_says_so() -> None:
    selection = select(llama(), ["model.layers.0.*", "*.down_proj"])
    assert all(path.startswith("model.layers.1.") for path in selection.candidates)
    assert len(selection.candidates) == 6
    assert reason(selection, "layers.0.mlp.down_proj.weight") == {"skipped by 'model.layers.0.*'"}
    assert reason(selection, "layers.1.mlp.down_proj.weight") == {"skipped by '*.down_proj'"}
    assert selection.coverage() == pytest.approx(7168 / (7168 + 2048 + 9216 + 160))


def test_one_pattern_needs_no_list() -> None:
    assert select(llama(), "*.k_proj").kept == select(llama(), ["*.k_proj"]).kept


@pytest.mark.parametrize("pattern", ["model.layers.2.*", "q_proj", "MODEL.*", ""])
def test_a_skip_pattern_that_matches_nothing_is_an_error_that_shows_paths(pattern: str) -> None:
    with pytest.raises(PlanError, match=r"matches no linear layer; paths look like model\.layers\.0\.self_attn\.q_pr"):
        select(llama(), ["*.up_proj", pattern])


@pytest.mark.parametrize("model", [llama, tied_llama])
def test_patterns_may_overlap_and_name_what_is_kept_anyway(model: object) -> None:
    selection = select(model(), ["*.mlp.*", "*.up_proj", "lm_head"])  # type: ignore[operator]
    assert len(selection.candidates) == 8
    assert reason(selection, "up_proj.weight") == {"skipped by '*.mlp.*'"}


# --- shared weights and other people's layers ----------------------------------------------------------------------


class Block(nn.Module):
    """Two linear layers that a test can tie."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


def test_a_weight_that_two_layers_share_is_kept_loudly() -> None:
    block = Block()
    block.b.weight = block.a.weight
    selection = select(block)
    assert list(selection.candidates) == ["c"]
    assert reason(selection, "a.weight") == {"shared by a and b"} and "b.weight" not in selection.kept
    assert selection.warnings == ("64 weights are kept: shared by a and b",)


def test_a_layer_that_is_used_under_two_names_is_kept_loudly() -> None:
    block = Block()
    block.b = block.a
    selection = select(block)
    assert list(selection.candidates) == ["c"] and reason(selection, "a.weight") == {"shared by a and b"}


def test_a_linear_layer_with_a_forward_of_its_own_is_kept_loudly() -> None:
    class Packed(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return input

    class Named(nn.Linear):
        pass

    block = Block()
    block.a, block.b = Packed(8, 8), Named(8, 8)
    selection = select(block)
    assert list(selection.candidates) == ["b", "c"]
    assert reason(selection, "a.weight") == {"Packed: not an nn.Linear"} and len(selection.warnings) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_what_torch_s_attention_reads_past_forward_is_kept_loudly(grad: bool) -> None:
    """A frozen model answers as in evaluation: no weight is hard in the one and latent in the other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 32)
    )
    selection = select(model, "*.out_proj")
    assert list(selection.candidates) == ["1", "3"]
    assert reason(selection, "out_proj.weight") == {"out_proj of MultiheadAttention, which reads the weight itself"}
    assert reason(selection, "out_proj.bias") == {"bias"}
    for name in ("linear1", "linear2"):
        why = f"{name} of TransformerEncoderLayer, which reads the weight itself"
        assert reason(selection, f"{name}.weight") == {why}
        assert f"2,048 weights are kept: {why}" in selection.warnings
    hestia.apply(model, hestia.plan(model)).eval()
    x = torch.randn(2, 5, 32)
    with torch.set_grad_enabled(grad):
        hard = model(x)
        hestia.freeze(model)
        assert torch.equal(model(x), hard)


def test_a_converted_model_has_the_same_account() -> None:
    model = qwen2()
    before = select(model)
    hestia.apply(model, hestia.plan(model))
    after = select(model)
    assert list(after.candidates) == list(before.candidates) and after.kept == before.kept


def test_a_linear_router_is_kept_as_one() -> None:
    model = llama()
    mlp: nn.Module = model.model.layers[0].mlp
    mlp.gate = nn.Linear(64, 4, bias=False)
    assert reason(select(model), "mlp.gate.weight") == {ROUTER}


def test_the_head_of_a_model_within_a_module_is_kept_all_the_same() -> None:
    """As where a LightningModule or a value head holds it."""
    for make in (llama, tied_llama):
        inner = make()
        whole, part = select(nn.ModuleDict({"model": inner, "value": nn.Linear(4, 4)})), select(inner)
        assert list(whole.candidates) == [*(f"model.{path}" for path in part.candidates), "value"]
        assert whole.kept == {f"model.{name}": kept for name, kept in part.kept.items()} | {
            "value.bias": Kept(reason="bias", weights=4)
        }


def test_a_layer_inside_a_router_is_kept() -> None:
    """As in Gemma 4 (router.proj), JetMoe (router.layer) and HunYuan (gate.wg)."""
    model = nn.ModuleDict({"router": nn.ModuleDict({"proj": nn.Linear(8, 4)}), "up": nn.Linear(8, 8)})
    selection = select(model)
    assert list(selection.candidates) == ["up"] and reason(selection, "router.proj.weight") == {ROUTER}


def test_weights_that_a_state_space_model_reads_itself_are_kept() -> None:
    """Quantized, they would train in full precision and be rounded at the end: the model never asks the layer."""
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    torch.manual_seed(0)
    model = MambaForCausalLM(config)
    plan = hestia.plan(model, "bitnet_ste", allow_partial=True)
    assert any(path.endswith("in_proj") for path in plan.layers)
    assert not [path for path in plan.layers if path.endswith("dt_proj")]
    hestia.apply(model, plan)
    ids = torch.arange(12).reshape(2, 6)
    before = model.eval()(input_ids=ids).logits
    hestia.freeze(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
