"""How many rows of a weight are worked on at once."""

import torch

from quant.device import HOST
from quant.row_spans import rows_of_span


def test_a_gpu_takes_most_weights_in_one_span() -> None:
    gpu = torch.device("cuda")
    # of 4096 and 11008 inputs in float32: 32 MiB on the host, 256 MiB on a GPU
    assert [rows_of_span(4 * 4096, device) for device in (HOST, gpu)] == [2048, 16384]
    assert [rows_of_span(4 * 11008, device) for device in (HOST, gpu)] == [762, 6096]
    # a row that is longer than a span is one
    assert rows_of_span(2**40, gpu) == 1
