"""The parity table has a line for every family that is served, and its command says when one is off."""

import pytest

from benchmarks import parity
from benchmarks.parity_models import PARITY_MODELS
from server.model.architectures import ARCHITECTURE_OF_TYPE


def test_every_family_that_is_served_is_in_the_table() -> None:
    assert set(ARCHITECTURE_OF_TYPE) <= set(PARITY_MODELS)
    assert all(PARITY_MODELS[model_type].model_type == model_type for model_type in ARCHITECTURE_OF_TYPE)


def test_a_line_has_the_difference_of_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["glm4"]) == 0

    header, line = capsys.readouterr().out.strip().splitlines()
    assert header.split() == ["model", "one", "step", "chunks", "token", "by", "token", "mixed", "batch"]
    name, *differences = line.split()
    assert name == "glm4"
    assert len(differences) == 4
    assert all(0 <= float(difference) < parity.LIMIT for difference in differences)


def test_more_than_the_order_of_summation_explains_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "LIMIT", 1e-9)

    assert parity.main(["llama"]) == 1

    assert "is more than what the order of summation explains" in capsys.readouterr().err


def test_a_model_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        parity.main(["llama", "gpt2"])

    assert refused.value.code == 2
    assert "there is no model gpt2; there are llama, mistral" in capsys.readouterr().err
