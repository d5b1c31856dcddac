import pytest

from hestia.errors import ConfigError, PlanError
from hestia.quant import BINARY, INT2, TERNARY, Grid
from hestia.targets import F16, PACK2, Q2_0, Q4_0, TARGETS, TQ1_0, TQ2_0, StorageType, target


@pytest.mark.parametrize(
    ("kind", "bits"), [(TQ1_0, 1.6875), (TQ2_0, 2.0625), (Q2_0, 2.25), (Q4_0, 4.5), (F16, 16.0)], ids=lambda v: str(v)
)
def test_stored_bits_are_those_of_the_format(kind: StorageType, bits: float) -> None:
    for shape in ((256, 256), (768, 512)):
        assert 8 * kind.stored_bytes(shape, "row") == bits * shape[0] * shape[1]


def test_packed_hf_bytes_are_words_scales_and_a_shape() -> None:
    """int32 words of 16 codes a row (padded), one bf16 scale a group, and the two int64 of weight_shape."""
    assert PACK2.stored_bytes((10, 64), "row") == 10 * 4 * 4 + 10 * 2 + 16
    assert PACK2.stored_bytes((10, 64), 32) == 10 * 4 * 4 + 10 * 2 * 2 + 16
    assert PACK2.stored_bytes((10, 172), "row") == 10 * 11 * 4 + 10 * 2 + 16  # 172 / 16 = 10.75 words


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        (TQ1_0, {"tensor", "row", 256}),
        (TQ2_0, {"tensor", "row", 256}),
        (Q2_0, {"tensor", "row", 256, 128, 64}),
        (Q4_0, {"tensor", "row", 256, 128, 64, 32}),
        (PACK2, {"tensor", "row", 256, 128, 64, 32}),
    ],
    ids=lambda v: v.name if isinstance(v, StorageType) else "",
)
def test_which_groups_are_held_without_loss(kind: StorageType, holds: set[object]) -> None:
    for group in ("tensor", "row", 256, 128, 64, 32):
        assert (kind.refusal(TERNARY, group, (8, 512)) is None) == (group in holds), group  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "divisor"), [(TQ1_0, 256), (TQ2_0, 256), (Q2_0, 64), (Q4_0, 32)])
def test_rows_must_be_whole_blocks(kind: StorageType, divisor: int) -> None:
    assert kind.refusal(TERNARY, "row", (8, 3 * divisor)) is None
    refusal = kind.refusal(TERNARY, "row", (8, 3 * divisor + 16))
    assert (
        refusal == f"{kind.name} stores rows in blocks of {divisor}, which do not divide in_features={3 * divisor + 16}"
    )


def test_codes_must_be_among_the_formats() -> None:
    assert TQ2_0.refusal(INT2, "row", (8, 256)) == "TQ2_0 cannot express the levels int2"
    assert Q2_0.refusal(INT2, "row", (8, 256)) == "Q2_0 cannot express the levels int2"
    assert Q2_0.refusal(Grid((-1, 0, 1, 2)), "row", (8, 256)) is None
    assert PACK2.refusal(INT2, "row", (8, 256)) is None
    assert PACK2.refusal(Grid((-3, -1, 1, 3)), "row", (8, 256)) is not None
    assert Q4_0.refusal(Grid(tuple(range(-8, 8))), "row", (8, 256)) is None
    assert TQ2_0.refusal(BINARY, "row", (8, 256)) is None


@pytest.mark.parametrize(
    ("columns", "stored"), [(256, "TQ2_0"), (768, "TQ2_0"), (576, "Q2_0"), (64, "Q2_0"), (96, "Q4_0"), (172, "F16")]
)
def test_fallback_takes_the_smallest_exact_type(columns: int, stored: str) -> None:
    assert target("gguf:tq2_0").storage(TERNARY, "row", (8, columns), fallback=True).name == stored


def test_without_leave_to_fall_back_the_message_says_what_would_hold_it() -> None:
    with pytest.raises(PlanError) as caught:
        target("gguf:tq2_0").storage(TERNARY, "row", (8, 576), fallback=False)
    message = str(caught.value)
    assert "TQ2_0 stores rows in blocks of 256, which do not divide in_features=576" in message
    assert "--fallback stores it as Q2_0" in message
    offered = message.split("--target ")[1].split(" would")[0].split(" or ")
    assert {"hf", "gguf:q2_0", "gguf:q4_0"} <= set(offered)
    for name in offered:
        assert TARGETS[name].storage(TERNARY, "row", (8, 576), fallback=False)


def test_what_nothing_holds_says_so() -> None:
    with pytest.raises(PlanError, match="no target holds it"):
        target("hf").storage(Grid((-100, 0, 100)), "row", (8, 256), fallback=True)


def test_unknown_targets_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gguf:tq2_0'"):
        target("gguf:tq20")
    assert {t.container for t in TARGETS.values()} <= {"hf", "gguf", "mlx"}


def test_the_mixed_target_stores_each_tensor_in_its_cheapest_exact_type() -> None:
    mixed = TARGETS["gguf:mixed"]
    for grid in (BINARY, TERNARY, INT2, Grid(tuple(range(-8, 8)))):
        for columns in (64, 96, 256, 768):
            chosen = mixed.storage(grid, "row", (8, columns), fallback=False)
            held = [t for t in mixed.types if t.refusal(grid, "row", (8, columns)) is None]
            assert chosen in held
            assert chosen.stored_bytes((8, columns), "row") == min(t.stored_bytes((8, columns), "row") for t in held)
    assert mixed.storage(TERNARY, "row", (8, 256), fallback=False) is TQ1_0
    assert mixed.storage(TERNARY, "row", (8, 64), fallback=False) is Q2_0
    assert mixed.storage(TERNARY, 32, (8, 64), fallback=False) is Q4_0
