"""A small model that guesses for a larger one: whether the two fit together, what it costs, and its drafter."""

import json
from pathlib import Path

import torch

from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.graph_recorder import GraphRecorder
from server.engine.kernel_choice import KernelChoice
from server.engine.kv_cache import KvCacheSize, KvGeometry, allocate_layers
from server.engine.memory_plan import weight_bytes
from server.engine.model_drafter import DraftLimits, ModelDrafter
from server.engine.model_runner import ModelRunner
from server.engine.runner_setup import BuiltRunner, build_graphs
from server.engine.scheduler import SchedulerLimits
from server.engine.warm_up import WarmUpLimits
from server.model.config import ModelConfig, read_model_config
from server.model.decoder import Decoder
from server.model.expected_tensors import check_tensors
from server.model.loader import LoadedModel, ignore_load_progress, load_model
from server.model.native_loader import find_native_obstacle

_TOKENIZER = "tokenizer.json"


def check_draft_model(config: EngineConfig, model: ModelConfig) -> None:
    """Raise EngineSetupError, before any weight is read, for a draft model whose tokens are not the model's."""
    if config.draft_model_path is None:
        return
    if not config.num_speculative_tokens:
        raise EngineSetupError(
            f"draft_model is {config.draft_model_path}, but num_speculative_tokens is 0, so nothing is guessed: "
            "set it to 4, say, or leave draft_model out"
        )
    directory = Path(config.draft_model_path)
    try:
        draft = read_model_config(directory)
        check_tensors(CheckpointReader.open(directory), draft)
    except CheckpointError as error:
        raise EngineSetupError(f"draft_model {directory}: {error}") from error
    if draft.vocab_size != model.vocab_size:
        raise EngineSetupError(
            f"draft_model {directory} knows {draft.vocab_size} tokens and the model {model.vocab_size}: a draft model "
            "must have the model's vocabulary, so take a small one of the same family"
        )
    vocabularies = [_read_vocabulary(Path(path)) for path in (config.model_path, directory)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise EngineSetupError(
            f"{_TOKENIZER} of draft_model {directory} gives tokens other numbers than the model's: a draft model must "
            "have the model's vocabulary, so take a small one of the same family"
        )


def check_draft_kernels(config: EngineConfig, kernels: KernelChoice) -> None:
    """Raise EngineSetupError for a draft model that native kernels do not run beside a model that they do.

    To torch one thread is left then: a draft model would hold everybody up.
    """
    if config.draft_model_path is None or kernels.native is None:
        return
    obstacle = find_native_obstacle(Path(config.draft_model_path))
    if obstacle is not None:
        raise EngineSetupError(
            f"draft_model {config.draft_model_path}: the native CPU kernels, which run the model, cannot run it: "
            f"{obstacle}. "
            "Quantize it with awq-serve quantize, or set cpu_kernel to torch"
        )


def _read_vocabulary(directory: Path) -> dict[str, int] | None:
    """The number of each token; None where no tokenizer.json beside the weights says so."""
    file = directory / _TOKENIZER
    if not file.is_file():
        return None
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if not isinstance(vocabulary, (dict, list)):
        return None
    # unigram models have a list of tokens and their scores
    numbered = (
        vocabulary.items()
        if isinstance(vocabulary, dict)
        else ((entry[0], number) for number, entry in enumerate(vocabulary))
    )
    return {**dict(numbered), **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}}


def load_draft_model(
    config: EngineConfig, device: torch.device, dtype: torch.dtype | None, kernels: KernelChoice
) -> LoadedModel | None:
    """None where the settings name none. Raises as `load_model` does."""
    if config.draft_model_path is None:
        return None
    directory = Path(config.draft_model_path)
    return load_model(directory, device, dtype, ignore_load_progress, kernels.native)


def draft_cost(config: EngineConfig) -> float:
    """What a step of one takes of the draft model, as a part of the model's: both read their weights for it."""
    if config.draft_model_path is None:
        return 0.0
    draft, model = (
        weight_bytes(CheckpointReader.open(Path(path)), None) for path in (config.draft_model_path, config.model_path)
    )
    return draft / model


def build_draft_runner(
    draft: LoadedModel | None,
    geometry: KvGeometry | None,
    size: KvCacheSize,
    limits: SchedulerLimits,
    device: torch.device,
    recorder: GraphRecorder | None,
) -> BuiltRunner | None:
    """What runs the draft model, with a cache of as many blocks as the model's; None without a draft model.

    geometry: of its cache. recorder: what its steps are recorded with. Raises EngineSetupError where the cache cannot
    be allocated.
    """
    if draft is None or geometry is None:
        return None
    layers = allocate_layers(size, geometry, device)
    within = WarmUpLimits(
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        min(size.max_model_len, draft.config.max_position_embeddings),
        draft.config.vocab_size,
        size.block_size,
    )
    graphs = None
    if isinstance(draft.decoder, Decoder):
        graphs = build_graphs(draft.decoder, layers, limits.max_num_seqs, within.max_model_len, recorder)
    return BuiltRunner(ModelRunner(draft.decoder, layers, graphs=graphs), graphs, within)


def build_drafter(built: BuiltRunner | None, size: KvCacheSize, limits: SchedulerLimits) -> ModelDrafter | None:
    """None without a draft model's runner."""
    if built is None:
        return None
    return ModelDrafter(
        built.runner,
        BlockPool(size.num_blocks, size.block_size),
        DraftLimits(
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
            built.limits.max_model_len,
            limits.prefix_caching,
        ),
    )
