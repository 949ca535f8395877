"""A checkpoint as saved, dequantized into a dense transformers model, so that its quality can be measured.

It reads the files a server would read; nothing in memory from the quantization is used.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from kernels.reference import dequantize
from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from quant.scale_groups import groups_for


def load_dense(directory: Path) -> PreTrainedModel:
    """The checkpoint's model in float32 on the CPU, every quantized weight multiplied out.

    Raises CheckpointError when a file is damaged, a tensor is missing or is none of the model's; SourceError for an
    unknown architecture.
    """
    reader = CheckpointReader.open(directory)
    groups_for(str(reader.config.get("model_type")))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: config.json describes no model: {error}") from error
    tensors = _dense_tensors(reader)
    # a head of its own is loaded as one, whatever the config says of a tied one
    config.tie_word_embeddings = config.tie_word_embeddings and "lm_head.weight" not in tensors
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{directory}: a tensor has another shape than config.json says: {error}") from error
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise CheckpointError(
            f"{directory} does not hold the tensors of its model; missing: {missing[:5]}, unknown: {unexpected[:5]}"
        )
    model.train(mode=False)
    return model


def _dense_tensors(reader: CheckpointReader) -> dict[str, Tensor]:
    quantized = reader.quantized_module_names
    packed_names = {tensor for name in quantized for tensor in reader.packed_tensor_names(name)}
    tensors = {name: reader.read_tensor(name) for name in reader.tensor_names if name not in packed_names}
    for name in quantized:
        tensors[f"{name}.weight"] = dequantize(reader.read_packed(name))
    return tensors
