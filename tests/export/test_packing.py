"""packing.py: exact round trips, gguf's own decoder and encoder as second opinions, and refusals."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hestia.errors import ExportError
from hestia.export.packing import PACKINGS, Packing, pack_q4_0, pack_tq1_0, pack_tq2_0
from hestia.quant import snap

EACH = pytest.mark.parametrize("name", sorted(PACKINGS))


def draw(packing: Packing, rows: int, blocks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random codes over the type's whole range and random snapped scales, extremes included."""
    rng = np.random.default_rng(seed)
    assert packing.storage.codes is not None
    low, high = packing.storage.codes
    codes = rng.integers(low, high + 1, size=(rows, blocks * packing.storage.block)).astype(np.int8)
    scales = snap(torch.from_numpy(np.exp(rng.uniform(-12, 12, size=(rows, blocks))).astype(np.float32))).numpy()
    return codes, scales


@EACH
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_round_trip_is_exact(name: str, rows: int, blocks: int, seed: int) -> None:
    packing = PACKINGS[name]
    codes, scales = draw(packing, rows, blocks, seed)
    packed = packing.pack(codes, scales)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, blocks * packing.storage.block_bytes)
    back, back_scales = packing.unpack(packed)
    assert back.dtype == np.int8
    assert np.array_equal(back, codes)
    assert np.array_equal(back_scales.view(np.uint32), scales.view(np.uint32))


@EACH
def test_accepts_torch_tensors_and_all_zero_blocks(name: str) -> None:
    packing = PACKINGS[name]
    codes = torch.zeros(2, packing.storage.block, dtype=torch.int8)
    back, scales = packing.unpack(packing.pack(codes, torch.full((2, 1), 0.5)))
    assert not back.any()
    assert (scales == 0.5).all()


@EACH
def test_every_code_at_every_position_moves_only_itself(name: str) -> None:
    packing = PACKINGS[name]
    block = packing.storage.block
    codes = np.eye(block, dtype=np.int8)
    back, _ = packing.unpack(packing.pack(codes, np.ones((block, 1), np.float32)))
    assert np.array_equal(back, codes)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q4_0"])
def test_the_gguf_package_decodes_codes_times_scales(name: str) -> None:
    packing = PACKINGS[name]
    codes, scales = draw(packing, 7, 3, seed=1)
    decoded = gguf.dequantize(packing.pack(codes, scales), gguf.GGMLQuantizationType[name])
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


@EACH
def test_refuses_codes_and_scales_it_cannot_hold(name: str) -> None:
    packing = PACKINGS[name]
    block = packing.storage.block
    assert packing.storage.codes is not None
    codes = np.zeros((2, block), np.int8)
    good = np.ones((2, 1), np.float32)
    for bad in (packing.storage.codes[0] - 1, packing.storage.codes[1] + 1):
        broken = codes.copy()
        broken[1, 3] = bad
        with pytest.raises(ExportError, match=f"got {bad} at row 1, column 3"):
            packing.pack(broken, good)
    for scale in (0.1, 1e-9, 1e6, float("nan"), float("inf")):
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
