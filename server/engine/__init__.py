"""Requests in, tokens out: scheduler, paged KV cache, model runner, sampler. Knows nothing of HTTP or text."""
