"""A checkpoint as saved, dequantized into a dense transformers model, so that its quality can be measured.

It reads the files a server would read; nothing in memory from the quantization is used.
"""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from kernels.reference import dequantize
from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from quant.model_structure import head_names


def load_dense(directory: Path) -> PreTrainedModel:
    """The checkpoint's model in float32 on the CPU, every quantized weight multiplied out.

    Raises CheckpointError when a file is damaged, the architecture is unknown, or a tensor is missing, is of another
    shape than config.json says, or is none of the model's.
    """
    reader = CheckpointReader.open(directory)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        # the tensors are dense by the time that transformers sees them
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # its class, and the names of its tensors; no memory
        with torch.device("meta"):
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: config.json describes no model: {error}") from error
    tensors = _dense_tensors(reader)
    # a head of its own is loaded as one, whatever the config says of a tied one
    config.tie_word_embeddings = config.tie_word_embeddings and not tensors.keys() & head_names(skeleton)
    try:
        loaded: object = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"{directory} does not hold the tensors of its model; some of an expert are missing: {error}"
        ) from error
    model, loading = cast(tuple[PreTrainedModel, dict[str, list[object]]], loaded)
    for problem in ("missing", "mismatched", "unexpected"):
        # a mismatched one is (name, shape in the file, shape that the config asks for)
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading[f"{problem}_keys"])
        if names:
            raise CheckpointError(
                f"{directory} does not hold the tensors of its model; {problem}: {', '.join(names[:5])}"
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
