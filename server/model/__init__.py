"""One config-driven decoder for the Llama family, and its strict loader."""
