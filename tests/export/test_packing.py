"""packing.py: exact round trips; the decoders of gguf and of llama.cpp itself as second opinions; refusals."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hestia.errors import ExportError
from hestia.export import llama_cpp
from hestia.export.packing import PACKINGS, Packing, pack_q4_0, pack_tq1_0, pack_tq2_0, round_q8_0
from hestia.quant import snap

EACH = pytest.mark.parametrize("name", sorted(PACKINGS))


NEEDS_LLAMA_CPP = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(not llama_cpp.available(), reason="llama-cpp-python is not installed"),
]


def draw(packing: Packing, rows: int, blocks: int, seed: int, form: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random codes over one of the type's whole ranges and random snapped scales, extremes included."""
    rng = np.random.default_rng(seed)
    assert packing.storage.levels is not None
    levels = np.array(packing.storage.levels[form % len(packing.storage.levels)], np.int8)
    codes = rng.choice(levels, size=(rows, blocks * packing.storage.block))
    scales = snap(torch.from_numpy(np.exp(rng.uniform(-12, 12, size=(rows, blocks))).astype(np.float32))).numpy()
    return codes, scales


def round_trips(name: str, rows: int, blocks: int, seed: int, form: int) -> None:
    packing = PACKINGS[name]
    codes, scales = draw(packing, rows, blocks, seed, form)
    packed = packing.pack(codes, scales)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, blocks * packing.storage.block_bytes)
    back, back_scales = packing.unpack(packed)
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)
    assert np.array_equal(back_scales.view(np.uint32), scales.view(np.uint32))


SHAPES = {
    "rows": st.integers(1, 5),
    "blocks": st.integers(1, 3),
    "seed": st.integers(0, 2**31),
    "form": st.integers(0, 2),
}


@EACH
@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_round_trip_is_exact(name: str, rows: int, blocks: int, seed: int, form: int) -> None:
    for more in range(60):  # 1,200 tensors a type, 10,800 in all
        round_trips(name, 1 + (rows + more) % 5, blocks, seed + more, form + more)


@pytest.mark.slow
@EACH
@settings(max_examples=1_000, deadline=None)
@given(**SHAPES)
def test_round_trip_is_exact_over_ten_thousand_tensors(name: str, rows: int, blocks: int, seed: int, form: int) -> None:
    for more in range(10):  # ten thousand a type
        round_trips(name, 1 + (rows + more) % 5, blocks, seed + more, form + more)


@EACH
def test_accepts_torch_tensors_and_all_zero_blocks(name: str) -> None:
    packing = PACKINGS[name]
    codes = torch.full((2, packing.storage.block), 1 if name == "Q1_0" else 0, dtype=torch.int8)
    back, scales = packing.unpack(packing.pack(codes, torch.full((2, 1), 0.5)))
    assert np.array_equal(back, codes)
    assert (scales == 0.5).all()


@EACH
def test_every_code_at_every_position_moves_only_itself(name: str) -> None:
    packing = PACKINGS[name]
    block = packing.storage.block
    codes = np.eye(block, dtype=np.int8)
    codes = 2 * codes - 1 if name == "Q1_0" else codes
    back, _ = packing.unpack(packing.pack(codes, np.ones((block, 1), np.float32)))
    assert np.array_equal(back, codes)


@pytest.mark.parametrize("form", [0, 1, 2])
@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q8_0"])
def test_the_gguf_package_decodes_codes_times_scales(name: str, form: int) -> None:
    packing = PACKINGS[name]
    codes, scales = draw(packing, 7, 3, seed=1, form=form)
    decoded = gguf.dequantize(packing.pack(codes, scales), gguf.GGMLQuantizationType[name])
    dense = codes.astype(np.float32) * np.repeat(scales, packing.storage.block, axis=1)
    assert np.array_equal(decoded, dense)


class TestLlamaCpp:
    pytestmark = NEEDS_LLAMA_CPP

    @pytest.mark.parametrize("form", [0, 1, 2])
    @EACH
    def test_llama_cpp_itself_decodes_codes_times_scales(self, name: str, form: int) -> None:
        import ggml

        packing = PACKINGS[name]
        codes, scales = draw(packing, 50, 4, seed=3, form=form)
        decoded = ggml.dequantize(packing.pack(codes, scales), name, codes.shape[1])
        dense = codes.astype(np.float32) * np.repeat(scales, packing.storage.block, axis=1)
        assert np.array_equal(decoded, dense)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_the_gguf_package_encodes_to_the_same_bytes(name: str) -> None:
    # Only where a block has a nonzero code: gguf's encoder takes d from the largest weight it sees.
    packing = PACKINGS[name]
    codes, scales = draw(packing, 7, 3, seed=2)
    codes[:, :: packing.storage.block] = 1
    dense = codes.astype(np.float32) * np.repeat(scales, packing.storage.block, axis=1)
    assert np.array_equal(gguf.quantize(dense, gguf.GGMLQuantizationType[name]), packing.pack(codes, scales))


def test_q4_0_is_exact_where_the_gguf_package_rounds() -> None:
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    dense = np.tile(np.float32([0.5, -0.5, 0.0, 0.5]), 8)[None]
    exact = gguf.dequantize(pack_q4_0(np.sign(dense).astype(np.int8), [[0.5]]), q4_0)
    assert np.array_equal(exact, dense)
    assert not np.array_equal(gguf.dequantize(gguf.quantize(dense, q4_0), q4_0), dense)


def test_known_bytes() -> None:
    # Worked out by hand from the layouts: one code of +1 at the start of an otherwise zero block, scale 1.0 (3c00).
    codes = np.zeros((1, 256), np.int8)
    codes[0, 0] = 1
    tq2 = pack_tq2_0(codes, [[1.0]])[0]
    assert tq2[0] == 0b01010110
    assert (tq2[1:64] == 0b01010101).all()
    assert bytes(tq2[64:]) == b"\x00\x3c"
    tq1 = pack_tq1_0(codes, [[1.0]])[0]
    assert tq1[0] == -(-256 * (2 * 81 + 27 + 9 + 3 + 1) // 243)
    assert (tq1[48:52] == -(-256 * (81 + 27 + 9 + 3) // 243)).all()
    q4 = pack_q4_0(codes[:, :32], [[1.0]])[0]
    assert bytes(q4[:2]) == b"\x00\x3c"
    assert q4[2] == 0x89
    q2 = PACKINGS["Q2_0"].pack(codes[:, :64], [[1.0]])[0]
    assert q2[2] == 0b01010110


def test_known_bytes_of_the_other_types() -> None:
    # One code of +1 at position 33 of a block of -1 (Q1_0) or 0, scale 1.0 (3c00): by hand from the layouts.
    codes = np.full((1, 128), -1, np.int8)
    codes[0, 33] = 1
    q1 = PACKINGS["Q1_0"].pack(codes, [[1.0]])[0]
    assert bytes(q1) == b"\x00\x3c" + bytes(4) + b"\x02" + bytes(11)  # bit 1 of byte 4
    codes = np.zeros((1, 256), np.int8)
    codes[0, 33] = 1
    q2k = PACKINGS["Q2_K"].pack(codes, [[1.0]])[0]
    assert bytes(q2k[:16]) == b"\x11" * 16
    assert q2k[16 + 1] == 0b01011001
    assert bytes(q2k[80:]) == b"\x00\x3c\x00\x3c"
    q3k = PACKINGS["Q3_K"].pack(codes, [[1.0]])[0]
    assert (q3k[:32] == 0xFF).all()
    assert q3k[32 + 1] == 0b00000100
    q4k = PACKINGS["Q4_K"].pack(codes, [[1.0]])[0]
    assert bytes(q4k[4:16]) == b"\x01" * 4 + b"\x08" * 4 + b"\x81" * 4
    assert q4k[16 + 1] == 0x98


@pytest.mark.parametrize("name", ["Q2_0", "Q3_K", "Q4_0"])
def test_mirrored_ranges_are_stored_with_a_negative_scale(name: str) -> None:
    packing = PACKINGS[name]
    assert packing.storage.levels is not None
    low, high = packing.storage.levels[0][0], packing.storage.levels[0][-1]
    beyond = high + 1 if -low > high else low - 1
    codes = np.zeros((1, 2 * packing.storage.block), np.int8)
    codes[0, -1] = beyond
    at = {"Q3_K": 108}.get(name, 0) + 1
    packed = packing.pack(codes, [[1.0, 1.0]])[0]
    assert packed[at] == 0x3C
    assert packed[packing.storage.block_bytes + at] == 0xBC
    codes[0, -2] = -beyond
    with pytest.raises(ExportError, match="in one block, got both ends"):
        packing.pack(codes, [[1.0, 1.0]])


def test_k_types_want_one_progression_a_tensor() -> None:
    codes = np.zeros((1, 256), np.int8)
    codes[0, :2] = (-3, 0)
    with pytest.raises(ExportError, match=r"in one tensor, got \[-3, 0\]"):
        PACKINGS["Q2_K"].pack(codes, [[1.0]])


@pytest.mark.parametrize(("name", "at"), [("Q2_K", 3), ("Q2_K", 83), ("Q3_K", 100), ("Q4_K", 2), ("Q4_K", 9)])
def test_blocks_that_hestia_never_writes_are_refused(name: str, at: int) -> None:
    packed = PACKINGS[name].pack(np.zeros((1, 256), np.int8), [[1.0]])
    packed[0, at] ^= 4
    with pytest.raises(ExportError, match="not written by hestia"):
        PACKINGS[name].unpack(packed)


def test_q8_0_rounds_to_the_nearest_and_says_when_it_cannot() -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((20, 96)) * np.exp(rng.uniform(-4, 4, (20, 1)))).astype(np.float32)
    values[3] = 0
    codes, scales = round_q8_0(values)
    error = np.abs(codes * np.repeat(scales, 32, axis=1) - values)
    assert (error <= 0.5001 * np.repeat(scales, 32, axis=1)).all()
    back, back_scales = PACKINGS["Q8_0"].unpack(PACKINGS["Q8_0"].pack(codes, scales))
    assert np.array_equal(back, codes)
    assert np.array_equal(back_scales, scales)
    with pytest.raises(ExportError, match="do not divide 40"):
        round_q8_0(np.zeros((1, 40), np.float32))
    with pytest.raises(ExportError, match="cannot hold the largest"):
        round_q8_0(np.full((1, 32), 1e9, np.float32))


@EACH
def test_refuses_codes_and_scales_it_cannot_hold(name: str) -> None:
    packing = PACKINGS[name]
    block = packing.storage.block
    assert packing.storage.levels is not None
    codes = np.full((2, block), 1 if name == "Q1_0" else 0, np.int8)
    good = np.ones((2, 1), np.float32)
    lowest, highest = min(r[0] for r in packing.storage.levels), max(r[-1] for r in packing.storage.levels)
    for bad in (lowest - 1, highest + 1) if name != "Q8_0" else (-128,):
        broken = codes.copy()
        broken[1, 3] = bad
        with pytest.raises(ExportError, match=f"got {bad} at row 1, column 3"):
            packing.pack(broken, good)
    for scale in (0.1, 1e-9, 1e6, float("nan"), float("inf"), -1.0, -0.0):
        scales = good.copy()
        scales[1, 0] = scale
        with pytest.raises(ExportError, match=r"fp16.*row 1, block 0"):
            packing.pack(codes, scales)
    with pytest.raises(ExportError, match=f"divisible by {block}"):
        packing.pack(codes[:, :-1], good)
    with pytest.raises(ExportError, match="int8"):
        packing.pack(codes.astype(np.int32), good)
    with pytest.raises(ExportError, match="block scales of shape"):
        packing.pack(codes, good[:1])
    with pytest.raises(ExportError, match="whole blocks"):
        packing.unpack(np.zeros((1, packing.storage.block_bytes + 1), np.uint8))


def test_an_eight_bit_code_never_wraps_around() -> None:
    """127 quanta of the smallest fp16 scale, which rounds down: 127 * 8.4e-8 / 6e-8 is 178, and int8 ends at 127."""
    codes, _ = round_q8_0(np.full((1, 32), 127 * 8.4e-8, np.float32))
    assert codes.tolist() == [[127] * 32]
    codes, _ = round_q8_0(np.full((1, 32), -127 * 8.4e-8, np.float32))
    assert codes.tolist() == [[-127] * 32]
