"""Reads how a model's makers want it sampled from its generation_config.json."""

from pathlib import Path

from quant.checkpoint.tensor_files import read_json_object
from server.engine.request import SamplingDefaults
from server.model.config import GENERATION_CONFIG_FILE
from server.model.config_fields import ConfigFields

# bounds of what a request may ask for too
_MAX_TEMPERATURE = 2
_MIN_TOP_P = 0.001
_MIN_PENALTY, _MAX_PENALTY = 0.01, 100


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """What the file says, do_sample aside; nothing without one. Raises CheckpointError for a value out of range."""
    file = directory / GENERATION_CONFIG_FILE
    if not file.is_file():
        return SamplingDefaults()
    fields = ConfigFields(read_json_object(file), GENERATION_CONFIG_FILE)
    return SamplingDefaults(
        temperature=fields.number("temperature", minimum=0, maximum=_MAX_TEMPERATURE, default=1),
        # -1 and 0 both mean all tokens
        top_k=max(fields.whole_number("top_k", minimum=-1, default=0), 0),
        top_p=fields.number("top_p", minimum=_MIN_TOP_P, maximum=1, default=1),
        repetition_penalty=fields.number("repetition_penalty", minimum=_MIN_PENALTY, maximum=_MAX_PENALTY, default=1),
    )
