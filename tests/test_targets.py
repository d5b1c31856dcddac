import pytest

from hestia.errors import ConfigError, PlanError
from hestia.quant import BINARY, INT2, TERNARY, Grid
from hestia.targets import (
    F16,
    MLX2,
    PACK2,
    PACK4,
    Q1_0,
    Q2_0,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_K,
    Q8_0,
    TARGETS,
    TQ1_0,
    TQ2_0,
    StorageType,
    file_bytes,
    head_type,
    matrix,
    target,
)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (Q1_0, 1.125), (TQ1_0, 1.6875), (TQ2_0, 2.0625), (Q2_0, 2.25), (Q2_K, 2.625), (Q3_K, 3.4375), (Q4_0, 4.5),
        (Q4_K, 4.5), (Q8_0, 8.5), (F16, 16.0),
    ],
    ids=lambda v: str(v),
)  # fmt: skip
def test_stored_bits_are_those_of_the_format(kind: StorageType, bits: float) -> None:
    for shape in ((256, 256), (768, 512)):
        assert 8 * kind.stored_bytes(shape, "row") == bits * shape[0] * shape[1]


def test_packed_hf_bytes_are_words_scales_and_a_shape() -> None:
    """int32 words of 16 codes a row (padded), one bf16 scale per group, and the two int64 of weight_shape."""
    assert PACK2.stored_bytes((10, 64), "row") == 10 * 4 * 4 + 10 * 2 + 16
    assert PACK2.stored_bytes((10, 64), 32) == 10 * 4 * 4 + 10 * 2 * 2 + 16
    assert PACK2.stored_bytes((10, 172), "row") == 10 * 11 * 4 + 10 * 2 + 16  # 172 / 16 = 10.75 words
    assert PACK4.stored_bytes((10, 64), "row") == 10 * 8 * 4 + 10 * 2 + 16
    assert MLX2.stored_bytes((10, 512), "row") == 10 * 32 * 4 + 10 * 4 * 4  # groups of 128, a scale and a bias each


def test_one_group_length_serves_every_tensor_of_a_file_without_blocks() -> None:
    """Rows of 576 and 1536 (SmolLM): groups of 64 and no longer, in the dtype of the dense weight."""
    shapes = [(576, 576), (1536, 576), (576, 1536)]
    for kind, numbers, extra in ((PACK2, 1, 16), (PACK4, 1, 16), (MLX2, 2, 0)):
        for itemsize in (2, 4):
            expected = [r * c * kind.bits // 8 + r * c // 64 * numbers * itemsize + extra for r, c in shapes]
            assert file_bytes([(kind, "row", shape) for shape in shapes], itemsize) == expected
    assert file_bytes([(PACK2, "row", (10, 64)), (PACK2, "row", (10, 172))]) == [10 * 16 + 20 + 16, 10 * 44 + 20 + 16]
    assert file_bytes([(PACK2, 16, (10, 64)), (TQ2_0, "row", (10, 256))]) == [10 * 16 + 80 + 16, 660]


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        (TQ1_0, {"tensor", "row", 256}),
        (TQ2_0, {"tensor", "row", 256}),
        (Q2_0, {"tensor", "row", 256, 128, 64}),
        (Q4_0, {"tensor", "row", 256, 128, 64, 32}),
        (PACK2, {"tensor", "row", 256, 128, 64, 32}),
        (PACK4, {"tensor", "row", 256, 128, 64, 32}),
        (MLX2, {"tensor", "row", 256, 128, 64, 32}),
        (Q2_K, {"tensor", "row", 256}),
        (Q8_0, {"tensor", "row", 256, 128, 64, 32}),
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
    assert Q2_0.refusal(INT2, "row", (8, 256)) is None  # as -q and -d
    assert Q2_0.refusal(Grid((-2, 0, 2)), "row", (8, 256)) is not None  # both ends at once
    assert Q2_K.refusal(Grid((-3, -1, 1, 3)), "row", (8, 256)) is None
    assert Q1_0.refusal(BINARY, "row", (8, 256)) is None
    assert Q1_0.refusal(TERNARY, "row", (8, 256)) == "Q1_0 cannot express the levels ternary"
    assert Q3_K.refusal(Grid(tuple(range(-4, 4))), "row", (8, 256)) is None
    assert Q4_K.refusal(Grid(tuple(range(-15, 16, 2))), "row", (8, 256)) is None
    assert MLX2.refusal(TERNARY, 16, (8, 256)) is not None
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


@pytest.mark.parametrize(
    ("grid", "columns", "names"),
    [
        (BINARY, 512, ["Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q8_0", "F16", "F32"]),
        (TERNARY, 512, ["TQ1_0", "TQ2_0", "Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q8_0", "F16", "F32"]),
        (INT2, 512, ["Q2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q8_0", "F16", "F32"]),
        (INT2, 576, ["Q2_0", "Q4_0", "Q8_0", "F16", "F32"]),
        (Grid((-3, -1, 1, 3)), 512, ["Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q8_0", "F16", "F32"]),
        (Grid(tuple(range(-4, 4))), 512, ["Q3_K", "Q4_0", "Q4_K", "Q8_0", "F16", "F32"]),
        (Grid((-7, -5, -3, -1, 1, 3, 5, 7)), 512, ["Q4_0", "Q4_K", "Q8_0", "F16", "F32"]),
        (Grid(tuple(range(-15, 16, 2))), 512, ["Q4_K", "Q8_0", "F16", "F32"]),
        (TERNARY, 172, ["F16", "F32"]),
    ],
    ids=lambda v: str(v),
)
def test_every_grid_has_its_exact_types(grid: Grid, columns: int, names: list[str]) -> None:
    types = TARGETS["gguf:mixed"].types
    assert [t.name for t in types if t.refusal(grid, "row", (8, columns)) is None] == names


def test_the_matrix_says_what_fits_and_why_not() -> None:
    rows = {row["target"]: row for row in matrix()}
    assert list(rows) == list(TARGETS)
    assert rows["gguf:tq2_0"]["groups"] == ["tensor", "row", 256]
    assert rows["gguf:tq2_0"]["bits_per_weight"] == 2.0625
    assert {row["fits"] for row in rows.values()} == {None}
    layers = [("a", TERNARY, "row", (8, 512)), ("b", TERNARY, 128, (8, 512))]
    rows = {row["target"]: row for row in matrix(layers)}  # type: ignore[arg-type]
    assert rows["gguf:q2_0"]["fits"] is True
    assert rows["gguf:tq2_0"]["fits"] == "TQ2_0 has one scale for 256 weights, finer groups of 128 do not fit"
    rows = {row["target"]: row for row in matrix(layers, fallback=True)}  # type: ignore[arg-type]
    assert rows["gguf:tq2_0"]["bits_per_weight"] == (2.0625 + 2.25) / 2
    assert rows["gguf:mixed"]["fits"] is True and rows["gguf:mixed"]["levels"] == "any"
    assert rows["gguf:mixed"]["bits_per_weight"] == (1.6875 + 2.25) / 2


def test_head_types_by_name() -> None:
    assert head_type("auto") is None
    assert head_type("q8_0") is Q8_0
    with pytest.raises(ConfigError, match="did you mean 'q8_0'"):
        head_type("q80")


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


def test_every_container_is_served() -> None:
    """A fourth one has its place in export/__init__.py, verify.py, engines.py, precheck.py and the model card."""
    assert {chosen.container for chosen in TARGETS.values()} == {"gguf", "hf", "mlx"}
