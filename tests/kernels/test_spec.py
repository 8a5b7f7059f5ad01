"""NSASpec: what it refuses, naming the field, and what follows from its fields."""

from typing import Any

import pytest

from nsa_kernels.spec import NSASpec

LEGACY: dict[str, Any] = {"selection": "fla_legacy", "num_init_blocks": 0, "num_local_blocks": 1}

COARSE: dict[str, Any] = {"score_map": "max_pool", "lse_len": 128, "lse_stride": 64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cmp_len": 0}, "cmp_len must be at least 1, got 0"),
        ({"cmp_stride": -1}, "cmp_stride must be at least 1, got -1"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"num_selected_blocks": 0}, "num_selected_blocks must be at least 1, got 0"),
        ({"num_init_blocks": -1}, "num_init_blocks must not be negative, got -1"),
        ({"num_local_blocks": -2}, "num_local_blocks must not be negative, got -2"),
        ({"window_size": -3}, "window_size must not be negative, got -3"),
        ({"cmp_len": 33}, "cmp_stride must divide cmp_len, got cmp_len 33 and cmp_stride 16"),
        ({"block_size": 72}, "cmp_stride must divide block_size, got block_size 72"),
        ({"cmp_len": 80}, "cmp_len must not exceed block_size, got cmp_len 80"),
        ({"num_selected_blocks": 2}, r"num_selected_blocks \(2\) must hold the forced blocks.*= 3"),
        ({"num_local_blocks": 0}, "num_local_blocks must be at least 1"),
        ({"score_map": "sum"}, "score_map must be 'overlap' or 'max_pool', got 'sum'"),
        ({"selection": "top"}, "selection must be 'exact' or 'fla_legacy', got 'top'"),
        ({**LEGACY, "num_selected_blocks": 9}, "even num_selected_blocks.*got.* 9 and 1 forced"),
        (
            {**LEGACY, "num_selected_blocks": 4, "num_init_blocks": 2},
            "even num_selected_blocks whose half holds.*got.* 4 and 3 forced",
        ),
        ({"dense_len": -1}, "dense_len must not be negative, got -1"),
        ({**LEGACY, "dense_len": 64}, "dense_len and lse_len need selection 'exact'"),
        ({**COARSE, "lse_stride": 0}, "lse_stride must divide lse_len, or both be 0.* 128 .* 0"),
        ({**COARSE, "lse_len": 96}, "lse_stride must divide lse_len.*lse_len 96"),
        ({**COARSE, "lse_stride": 128}, "lse_stride must divide block_size, got block_size 64"),
        ({**COARSE, "lse_len": 1088}, r"num_selected_blocks \* block_size = 1024, got 1088"),
        ({**COARSE, "score_map": "overlap"}, "lse_len needs score_map 'max_pool', got 'overlap'"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSASpec(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"window_size": 0},
        {"num_selected_blocks": 3},
        {"cmp_len": 64, "cmp_stride": 64},
        {**LEGACY, "num_selected_blocks": 2},
        {**LEGACY, "num_selected_blocks": 4, "num_init_blocks": 1},
        COARSE,
        {**COARSE, "lse_len": 1024, "dense_len": 8192},
    ],
)
def test_the_limits_themselves_are_allowed(fields: dict[str, Any]) -> None:
    spec = NSASpec(**fields)
    assert {name: getattr(spec, name) for name in fields} == fields


def test_windows_and_entries_follow_from_the_geometry() -> None:
    spec = NSASpec(cmp_len=32, cmp_stride=16, block_size=64)
    assert (spec.strides_per_window, spec.cmp_entries_per_page) == (2, 4)
    for num_tokens in (0, 1, 31, 32, 47, 48, 63, 64, 111):
        starts = [i for i in range(0, num_tokens, 16) if i + 32 <= num_tokens]
        assert spec.num_windows(num_tokens) == len(starts)


@pytest.mark.parametrize(
    ("dense_len", "width", "num_dense"),
    [(0, 16, 1024), (1, 16, 1024), (1025, 16, 1024), (1026, 17, 1025), (8192, 128, 8191)],
)
def test_dense_queries_set_the_width_of_a_list(dense_len: int, width: int, num_dense: int) -> None:
    spec = NSASpec(dense_len=dense_len)
    assert (spec.block_table_width, spec.num_dense_tokens) == (width, num_dense)


def test_coarse_windows_are_windows_like_others() -> None:
    coarse = NSASpec(**COARSE).coarse
    assert (coarse.cmp_len, coarse.cmp_stride, coarse.block_size) == (128, 64, 64)
    assert (coarse.strides_per_window, coarse.cmp_entries_per_page) == (2, 1)
    assert [coarse.num_windows(n) for n in (127, 128, 191, 192)] == [0, 1, 1, 2]
