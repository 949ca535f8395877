"""When decoding is recorded, and what is said where memory runs out."""

from dataclasses import replace

import pytest
import torch

from server.engine.config import EngineConfig
from server.engine.decode_graphs import DecodeGraphs
from server.engine.graph_sizes import GraphSize
from server.engine.model_runner import ModelRunner
from server.engine.runner_setup import BuiltRunner, choose_recorder, get_ready, records_graphs
from server.engine.warm_up import WarmUpLimits
from server.model.loader import LoadProgress
from tests.server.engine.counting_decoder import CountingDecoder, number_cache
from tests.server.engine.test_decode_graphs import MemoryFor

CPU = torch.device("cpu")
CONFIG = EngineConfig("model")


def test_decoding_is_recorded_on_a_gpu_unless_the_settings_say_otherwise() -> None:
    cuda = torch.device("cuda")
    assert records_graphs(CONFIG, cuda)
    assert not records_graphs(replace(CONFIG, enforce_eager=True), cuda)
    assert not records_graphs(CONFIG, CPU)
    assert choose_recorder(CONFIG, CPU) is None


def test_one_sentence_says_which_graphs_found_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    decoder, layers = CountingDecoder(), (number_cache(9, 4),)
    sizes = (GraphSize(4, 16), GraphSize(2, 16), GraphSize(1, 16))
    graphs = DecodeGraphs(decoder, layers, sizes, 8, MemoryFor(1, is_broken=False))
    built = BuiltRunner(ModelRunner(decoder, layers, graphs=graphs), graphs, WarmUpLimits(4, 64, 16, 100, 4))
    progress: list[LoadProgress] = []

    get_ready([built], CPU, progress.append)

    assert [one.detail for one in progress] == [f"recording decoding graph {number} of 3" for number in (1, 2, 3)]
    told = capsys.readouterr().err
    assert told.startswith("2 of 3 decoding graphs found no memory, the largest that of 2 sequences of 16 tokens;")
    assert told.count("\n") == 1
