"""A batch of sequences in the middle of their answers: one step of the decoder, ready to be captured and replayed."""

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.gpu_phases.bench import Bench
from benchmarks.gpu_phases.operands import Sequences, batch_of, random_cache, random_rows
from benchmarks.gpu_phases.sizes import HeadShape
from benchmarks.gpu_phases.stopwatch import Call
from kernels import dispatch
from kernels.paged_batch import PagedLayer
from server.model.decoder import Decoder, Mlp
from server.model.loader import LoadedModel


class DecodeStep:
    """num_streams sequences with context_len tokens each, and room for max_steps more.

    Every run computes the next token of each sequence from the last one and leaves its state on the device, so it can
    be replayed: nothing is decided on the host.
    """

    def __init__(
        self, bench: Bench, model: LoadedModel, num_streams: int, context_len: int, max_steps: int, block_size: int
    ) -> None:
        config = model.config
        # the only other one is for CPUs
        assert isinstance(model.decoder, Decoder)
        self._decoder = model.decoder
        self._head_dim = config.head_dim
        self._block_size = block_size
        heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        # planned as if max_steps were in the cache: that is how many blocks there are, and what sizes the launches
        room = Sequences((context_len + max_steps - 1,) * num_streams, (1,) * num_streams, block_size)
        dtype = model.decoder.embedding.dtype
        self.kv_layers: tuple[PagedLayer, ...] = tuple(
            random_cache(bench, heads, room.num_blocks, block_size, dtype, seed=index)
            for index in range(config.num_layers)
        )
        self.batch = batch_of(room, bench.device)
        self.batch.context_lens.fill_(context_len)
        self.token_ids = torch.arange(num_streams, device=bench.device) % config.vocab_size
        self.positions = torch.full((num_streams,), context_len - 1, device=bench.device)
        self._set_slots()
        self._rows = random_rows(bench, (num_streams, config.hidden_size), dtype, seed=1)
        self._wide_rows = random_rows(bench, (num_streams, config.intermediate_size), dtype, seed=2)
        self._queries = random_rows(bench, (num_streams, heads.num_heads, heads.width), dtype, seed=3)

    def run(self) -> None:
        decoder = self._decoder
        hidden = decoder.forward(self.token_ids, self.positions, self.batch, self.kv_layers)
        self.token_ids.copy_(decoder.compute_logits(hidden).argmax(dim=-1))
        self.positions.add_(1)
        self.batch.context_lens.add_(1)
        self._set_slots()

    def _set_slots(self) -> None:
        blocks = self.batch.block_tables.long().gather(1, (self.positions // self._block_size)[:, None])[:, 0]
        self.batch.slot_mapping.copy_(blocks * self._block_size + self.positions % self._block_size)

    def linear_calls(self) -> Sequence[Call]:
        """The linears of all blocks, each once, on rows of their width; without the experts of mixtures."""
        calls: list[Call] = []
        for layer in self._decoder.layers:
            calls += [partial(layer.attention.qkv, self._rows), partial(layer.attention.output, self._rows)]
            if isinstance(layer.mlp, Mlp):
                calls += [partial(layer.mlp.gate_up, self._rows), partial(layer.mlp.down, self._wide_rows)]
        return calls

    def attention_calls(self) -> Sequence[Call]:
        """The attention of all blocks, each once, over as much as the sequences hold now."""
        plan = dispatch.plan_attention(self.batch, self.kv_layers[0], {None})
        scale = self._head_dim**-0.5
        return [
            partial(dispatch.attention, self._queries, layer, plan, softmax_scale=scale) for layer in self.kv_layers
        ]

    def head_calls(self) -> Sequence[Call]:
        return [partial(self._decoder.compute_logits, self._rows)]
