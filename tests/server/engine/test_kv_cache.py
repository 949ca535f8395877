from dataclasses import replace

import pytest
import torch

from server.engine import host_memory
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.kv_cache import KvGeometry, allocate_layers, check_context_len, choose_dtype, choose_size

CPU = torch.device("cpu")
GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16, max_model_len=1000)
BYTES_PER_TOKEN = 2 * 3 * 2 * 16 * 2
CONFIG = EngineConfig("model", max_num_seqs=4, block_size=8)


def test_a_token_takes_its_keys_and_values_in_every_layer() -> None:
    assert GEOMETRY.bytes_per_token == BYTES_PER_TOKEN


def test_the_cache_takes_the_bytes_it_is_given() -> None:
    size = choose_size(replace(CONFIG, kv_cache_bytes=100 * BYTES_PER_TOKEN), GEOMETRY, CPU)
    # 100 tokens are 12 blocks of 8, and the context is cut to them
    assert (size.num_blocks, size.block_size, size.max_model_len) == (12, 8, 96)


def test_no_more_is_taken_than_all_sequences_need() -> None:
    size = choose_size(replace(CONFIG, max_model_len=20, kv_cache_bytes=10**9), GEOMETRY, CPU)
    assert (size.num_blocks, size.max_model_len) == (4 * 3, 20)


def test_unasked_a_cpu_gives_at_most_a_quarter_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 4 * 240 * BYTES_PER_TOKEN)
    assert choose_size(CONFIG, GEOMETRY, CPU).num_blocks == 30


def test_a_context_that_does_not_fit_is_refused_with_the_number_to_change() -> None:
    config = replace(CONFIG, max_model_len=512, kv_cache_bytes=256 * BYTES_PER_TOKEN)
    with pytest.raises(
        EngineSetupError, match=r"holds 256 tokens, fewer than max_model_len 512: raise kv_cache_memory"
    ):
        choose_size(config, GEOMETRY, CPU)


def test_a_cache_without_room_for_one_block_is_refused() -> None:
    # and nothing is said of a max_model_len that nobody set
    words = rf"than a block of 8: raise kv_cache_memory, which is 100 \(at least {8 * BYTES_PER_TOKEN} .*block_size"
    with pytest.raises(EngineSetupError, match=words):
        choose_size(replace(CONFIG, kv_cache_bytes=100), GEOMETRY, CPU)


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(EngineSetupError, match=r"max_model_len is 1001.*at most 1000"):
        check_context_len(replace(CONFIG, max_model_len=1001), 1000)


def test_the_tensors_have_the_shape_that_the_kernels_read() -> None:
    size = choose_size(replace(CONFIG, kv_cache_bytes=100 * BYTES_PER_TOKEN), GEOMETRY, CPU)
    layers = allocate_layers(size, GEOMETRY, CPU)
    assert len(layers) == 3
    for layer in layers:
        assert layer.keys.shape == layer.values.shape == (12, 2, 8, 16)
        assert layer.keys.dtype == torch.bfloat16
        assert layer.keys.data_ptr() != layer.values.data_ptr()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_a_cache_of_codes_takes_a_byte_a_number_and_a_scale_a_head(dtype: torch.dtype) -> None:
    geometry = replace(GEOMETRY, dtype=dtype)

    assert geometry.bytes_per_token == 2 * 3 * 2 * (16 + 4)
    layers = allocate_layers(choose_size(replace(CONFIG, kv_cache_bytes=10**5), geometry, CPU), geometry, CPU)
    taken = sum(
        tensor.nbytes
        for layer in layers
        for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales)
        if tensor is not None
    )
    assert 0.9 * 10**5 < taken <= 10**5


def test_blocks_of_codes_hold_pairs_of_tokens() -> None:
    with pytest.raises(EngineSetupError, match=r"block_size is 7, but .* pairs"):
        choose_size(replace(CONFIG, block_size=7), replace(GEOMETRY, dtype=torch.uint8), CPU)


def test_the_cache_has_the_models_dtype_unless_told_otherwise() -> None:
    chosen = {
        name: choose_dtype(replace(CONFIG, kv_cache_dtype=name), torch.float32, CPU)
        for name in ("auto", "bfloat16", "int8", "fp8")
    }

    assert chosen == {
        "auto": torch.float32,
        "bfloat16": torch.bfloat16,
        "int8": torch.uint8,
        "fp8": torch.float8_e4m3fn,
    }


def test_a_gpu_reads_no_other_floats_than_the_models() -> None:
    gpu = torch.device("cuda")

    assert choose_dtype(replace(CONFIG, kv_cache_dtype="float16"), torch.float16, gpu) == torch.float16
    with pytest.raises(EngineSetupError, match="kv_cache_dtype is float16, but the model computes in bfloat16"):
        choose_dtype(replace(CONFIG, kv_cache_dtype="float16"), torch.bfloat16, gpu)


def test_free_memory_is_a_part_of_this_machines() -> None:
    assert 2**20 < host_memory.available_bytes() < 2**50


def test_scratch_blocks_come_after_those_of_sequences_and_within_the_memory_that_was_asked_for() -> None:
    geometry = replace(GEOMETRY, num_scratch_blocks=1)
    config = replace(CONFIG, kv_cache_bytes=100 * BYTES_PER_TOKEN)
    size = choose_size(config, geometry, CPU)
    assert size.num_blocks == choose_size(config, GEOMETRY, CPU).num_blocks - 1
    assert len(allocate_layers(size, geometry, CPU)[0].keys) == size.num_blocks + 1
