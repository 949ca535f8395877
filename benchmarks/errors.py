"""Why a benchmark cannot go on, as a sentence for the terminal."""


class BenchmarkError(Exception):
    """What is missing or went wrong, and what would help."""
