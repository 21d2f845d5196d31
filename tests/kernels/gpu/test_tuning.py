"""Tests of the choice of tiles: from a table if there is one, else by the rules."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from moray.kernels.gpu import tuning as tiles
from moray.kernels.gpu.aot import GPUS
from moray.kernels.gpu.tuning import (
    Gpu,
    Key,
    TileConfig,
    default_tile,
    read_table,
    select_tile,
    table_name,
    tiles_in_use,
    write_table,
)
from moray.kernels.gpu.weight_formats import PACKED_BLOCK_K, PACKED_FORMATS

PHI_UP = Key(n=12800, k=4096, dtype=torch.bfloat16, num_experts=16)
QUANTIZED = [
    replace(PHI_UP, format=format, group_size=group_size) for format in PACKED_FORMATS for group_size in (0, 32, 128)
]
A100, H100 = GPUS[80], GPUS[90]
SMALL, LARGE = TileConfig(16, 64, 64, 4, 4, 3), TileConfig(64, 128, 64, 8, 8, 2)


@pytest.fixture
def h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    monkeypatch.setattr(tiles, "device", lambda: Gpu("nvidia-h200", (9, 0), 232_448))
    return tmp_path


def test_a_table_is_taken_for_its_operation_shape_dtype_device_and_triton(h200: Path) -> None:
    write_table(
        h200 / table_name("experts_up", PHI_UP, "nvidia-h200", triton.__version__), (9, 0), {8: SMALL, 64: LARGE}
    )
    chosen = [select_tile("experts_up", PHI_UP, m) for m in (1, 8, 9, 64, 65, 10_000)]
    assert chosen == [SMALL, SMALL, LARGE, LARGE, LARGE, LARGE]
    for op, key in [
        ("experts_down", PHI_UP),
        ("experts_up", replace(PHI_UP, k=64)),
        ("experts_up", replace(PHI_UP, n=64)),
        ("experts_up", replace(PHI_UP, num_experts=8)),
        ("experts_up", replace(PHI_UP, dtype=torch.float16)),
        ("experts_up", replace(PHI_UP, format="int8")),
    ]:
        assert select_tile(op, key, 8) == default_tile(key, 8, H100)


def test_a_table_is_read_once(h200: Path) -> None:
    path = h200 / table_name("experts_up", PHI_UP, "nvidia-h200", triton.__version__)
    write_table(path, (9, 0), {8: SMALL})
    assert select_tile("experts_up", PHI_UP, 8) == SMALL
    path.unlink()
    assert select_tile("experts_up", PHI_UP, 8) == SMALL


def test_a_table_does_not_choose_block_k(h200: Path) -> None:
    """A table of the whole weight alone would cut its sums in another way than those of a rank's part."""
    path = h200 / table_name("linear", PHI_UP, "nvidia-h200", triton.__version__)
    write_table(path, (9, 0), {8: replace(SMALL, block_k=128)})
    assert select_tile("linear", PHI_UP, 8) == SMALL


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(
    "key", [PHI_UP, replace(PHI_UP, dtype=torch.float16), Key(4096, 4096, torch.bfloat16), *QUANTIZED]
)
def test_the_rule_cuts_sums_alike_for_every_number_of_rows_and_of_outputs(key: Key, gpu: Gpu) -> None:
    chosen = [default_tile(key, m, gpu) for m in range(1, 5000, 7)]
    parts = [default_tile(replace(key, n=key.n // size), m, gpu) for size in (2, 4, 8) for m in (1, 32, 256, 4096)]
    assert {tile.block_k for tile in chosen + parts} == {key.block_k}
    assert [tile.block_m for tile in chosen] == sorted(tile.block_m for tile in chosen)
    has_small_groups = key.format != "dense" and 0 < key.group_size < PACKED_BLOCK_K[key.format]
    assert {tile.block_m for tile in chosen} == {16, 32, 64} | (set() if has_small_groups else {128})


@pytest.mark.parametrize("key", [*QUANTIZED, replace(QUANTIZED[0], dtype=torch.float32)])
def test_quantized_weights_are_cut_as_they_are_packed(key: Key) -> None:
    assert key.format != "dense"
    chosen = {default_tile(key, m, gpu).block_k for gpu in GPUS.values() for m in (1, 100, 2000, 9000)}
    assert chosen == {PACKED_BLOCK_K[key.format]}


def test_a_table_is_of_one_format_and_group_size() -> None:
    names = {table_name("experts_up", key, "nvidia-h200", "3.7.1") for key in (PHI_UP, *QUANTIZED)}
    assert len(names) == 1 + len(QUANTIZED)
    assert "experts_up_e16_n12800_k4096_bfloat16_int4-g128_nvidia-h200_triton3.7.1.json" in names


def test_middling_numbers_of_rows_keep_most_of_the_card_busy() -> None:
    """For a projection as wide as the model, the widest tile would occupy only 16 programs at 128 rows."""
    for m in (65, 128, 200, 256, 512):
        tile = default_tile(Key(4096, 4096, torch.bfloat16), m, H100)
        assert triton.cdiv(m, tile.block_m) * triton.cdiv(4096, tile.block_n) >= 96
    assert default_tile(Key(4096, 4096, torch.bfloat16), 2048, H100).block_n == 256


@pytest.mark.parametrize("up", [PHI_UP, *QUANTIZED])
def test_up_and_down_agree_on_the_rows_of_a_block(up: Key) -> None:
    down = replace(up, n=4096, k=6400)
    for m in range(1, 5000, 7):
        assert default_tile(up, m, H100).block_m == default_tile(down, m, H100).block_m


def test_tiles_in_use_are_the_rule_s_and_the_tables_of_that_capability(h200: Path) -> None:
    write_table(h200 / table_name("experts_up", PHI_UP, "nvidia-h200", "3.6.0"), (9, 0), {8: SMALL, 64: LARGE})
    assert {SMALL, LARGE} < set(tiles_in_use("experts_up", PHI_UP, H100))
    assert not {SMALL, LARGE} & set(tiles_in_use("experts_up", PHI_UP, A100))
    assert default_tile(PHI_UP, 64, A100) in tiles_in_use("experts_up", PHI_UP, A100)


def test_every_shipped_table_can_be_read() -> None:
    for path in tiles.FOLDER.glob("*.json"):
        assert read_table(path, 64), path.name


@pytest.mark.parametrize(
    "key", [PHI_UP, replace(PHI_UP, dtype=torch.float32), Key(32064, 4096, torch.float16), *QUANTIZED]
)
def test_tiles_fit_the_shared_memory_of_every_card(key: Key) -> None:
    turing = Gpu("t4", (7, 5), 65_536)
    for gpu in (*GPUS.values(), turing):
        for m in range(1, 5000, 7):
            assert key.shared_bytes(default_tile(key, m, gpu)) <= gpu.shared_memory


def test_few_programs_keep_more_blocks_under_way() -> None:
    """Each multiprocessor has one program of a projection, which takes its memory; of a vocabulary it has four."""
    qkv, vocabulary = Key(6144, 4096, torch.bfloat16), Key(32064, 4096, torch.bfloat16)
    assert [default_tile(qkv, m, H100).num_stages for m in (1, 32, 64)] == [8, 8, 8]
    assert [default_tile(vocabulary, m, H100).num_stages for m in (1, 32, 64)] == [5, 4, 4]
    # Two programs a multiprocessor: both fit.
    for gpu in GPUS.values():
        tile = default_tile(Key(16896, 4096, torch.bfloat16), 1, gpu)
        assert tile.num_stages == 5 or 2 * (qkv.shared_bytes(tile) + 1024) <= gpu.shared_memory + 1024


def test_only_cards_with_wide_mma_take_its_tiles() -> None:
    """12.0 is larger than 9.0 but is a workstation's GPU; data center Blackwell is 10.0."""
    widest = {target: default_tile(PHI_UP, 4096, gpu).block_n for target, gpu in GPUS.items()}
    assert widest == {80: 128, 86: 128, 89: 128, 90: 256, 100: 128, 120: 128}
