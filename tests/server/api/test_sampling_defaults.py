"""What a request does not say is what the model's makers want; what it says wins."""

import pytest

from server.api.sampling_fields import LogprobCounts, SamplingFields, sampling_params
from server.engine.request import ModelInfo, SamplingDefaults

MODEL = ModelInfo(
    *("/models/tiny", 256, 272, (258,), "cpu", "float32", 100, 16),
    sampling_defaults=SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1),
)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (0.6, 20, 0.9, 1.1)),
        ({"temperature": None, "top_k": None}, (0.6, 20, 0.9, 1.1)),
        ({"temperature": 0.0, "top_k": 0}, (0.0, 0, 0.9, 1.1)),
        ({"top_k": -1, "top_p": 1.0, "repetition_penalty": 1.0}, (0.6, 0, 1.0, 1.0)),
    ],
)
def test_the_requests_own_fields_win(given: dict[str, object], wanted: tuple[float, ...]) -> None:
    params = sampling_params(SamplingFields.model_validate(given), MODEL, 8, LogprobCounts(None, None))
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == wanted
