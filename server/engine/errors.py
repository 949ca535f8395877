"""What keeps an engine from starting, as one sentence for whoever started it."""


class EngineSetupError(Exception):
    """The settings do not fit the machine or the model: which one, its value, and what would do."""
