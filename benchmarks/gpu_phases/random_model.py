"""A model of random weights that was never on a disk: made on the device, name by name, as a checkpoint is read."""

from collections.abc import Collection

import torch
from torch import Tensor

from benchmarks.gpu_phases.bench import Bench
from benchmarks.gpu_phases.operands import CODE_BITS, random_rows, random_weight
from benchmarks.gpu_phases.sizes import LinearShape, ModelShape
from kernels.layout import PackedWeight
from quant.checkpoint.stored_module import PackedSpec
from server.model.config import ModelConfig
from server.model.expected_tensors import EMBEDDING, HEAD, LinearSpec, layer_spec
from server.model.loader import LoadedModel, build_model, ignore_load_progress

GROUP_SIZE = 128
SCALE_BITS, ZERO_BITS = 16, 16


class RandomWeights:
    """Every linear of the blocks packed in groups of 128, the rest dense; each is a function of its name alone."""

    def __init__(self, bench: Bench, config: ModelConfig) -> None:
        self._bench = bench
        self._config = config
        layers = [layer_spec(config, index) for index in range(config.num_layers)]
        self._linears: dict[str, LinearSpec] = {linear.name: linear for layer in layers for linear in layer.linears}

    @property
    def tensor_names(self) -> Collection[str]:
        return (EMBEDDING, f"{HEAD}.weight")

    def is_quantized(self, module_name: str) -> bool:
        return module_name in self._linears

    def packed_spec(self, module_name: str) -> PackedSpec:
        linear = self._linears[module_name]
        return PackedSpec(linear.num_outputs, linear.num_inputs, CODE_BITS, self.group_size, torch.float16)

    def read_packed(self, module_name: str) -> PackedWeight:
        linear = self._linears[module_name]
        shape = LinearShape(module_name, linear.num_outputs, linear.num_inputs)
        return random_weight(self._bench, shape, self.group_size, seed=self._seed(module_name))

    def read_tensor(self, name: str) -> Tensor:
        """The embedding and the head; a norm multiplies by 1."""
        config, dtype = self._config, torch.float16
        if name not in self.tensor_names:
            return torch.ones(config.hidden_size, dtype=dtype, device=self._bench.device)
        values = random_rows(self._bench, (config.vocab_size, config.hidden_size), dtype, seed=self._seed(name))
        return values if name == EMBEDDING else values.div_(config.hidden_size**0.5)

    @property
    def group_size(self) -> int:
        """128, or what a rehearsal's narrow layers can be cut into."""
        widths = {linear.num_inputs for linear in self._linears.values()}
        return next(size for size in (GROUP_SIZE, 64, 32) if not any(width % size for width in widths))

    def _seed(self, name: str) -> int:
        return sum(map(ord, name))


def build_random_model(bench: Bench, shape: ModelShape, max_position_embeddings: int) -> LoadedModel:
    """A Llama of that shape on the device: float16 on a GPU, float32 on a CPU."""
    config = ModelConfig.from_dict(shape.to_config(max_position_embeddings))
    dtype = torch.float16 if bench.device.type == "cuda" else torch.float32
    return build_model(RandomWeights(bench, config), config, bench.device, dtype, ignore_load_progress)


def weight_bytes(config: ModelConfig) -> int:
    """What one step has to read of the weights: packed linears with scales and zero points, and the head."""
    linears = [linear for index in range(config.num_layers) for linear in layer_spec(config, index).linears]
    num_weights = sum(linear.num_outputs * linear.num_inputs for linear in linears)
    bits = CODE_BITS + (SCALE_BITS + ZERO_BITS) / GROUP_SIZE
    return round(num_weights * bits / 8) + 2 * config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig) -> int:
    """Of the linears of the blocks; attention and the head, which only the last token of a prompt needs, left out."""
    linears = [linear for index in range(config.num_layers) for linear in layer_spec(config, index).linears]
    return 2 * sum(linear.num_outputs * linear.num_inputs for linear in linears)
