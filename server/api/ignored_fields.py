"""Data: request fields of other servers that change nothing of an answer here: ignored, and counted by name."""

from collections.abc import Iterable

IGNORED_FIELDS = frozenset(
    {
        # OpenAI
        *("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store", "verbosity"),
        # vLLM
        *("detokenize", "kv_transfer_params", "mm_processor_kwargs", "request_id"),
        *("spaces_between_special_tokens", "vllm_xargs"),
        # llama.cpp
        *("cache_prompt", "id_slot", "n_keep", "n_probs", "post_sampling_probs", "samplers", "timings_per_token"),
        # SGLang, TGI, OpenRouter
        *("bootstrap_host", "details", "no_stop_trim", "provider", "return_full_text", "rid", "transforms"),
    }
)
# a client may invent names without end, and each label is a time series for ever
OTHER = "other"


def field_labels(names: Iterable[str]) -> list[str]:
    """The labels under which fields that nobody reads are counted: never a name that a client invented."""
    return [name if name in IGNORED_FIELDS else OTHER for name in names]
