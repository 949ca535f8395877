"""Which layers of a model see back how far, as config.json says it."""

from quant.errors import CheckpointError
from server.model.architectures import Window
from server.model.config_fields import ConfigFields

SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(window: Window, fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Per layer, how many tokens it sees back (None: all). Raises CheckpointError naming the field that is wrong."""
    if window is Window.NEVER:
        return (None,) * num_layers
    if window is Window.ALL_BUT_EVERY_NTH:
        width, pattern = fields.positive_int("sliding_window"), fields.positive_int("sliding_window_pattern")
        listed = _read_layer_types(fields, num_layers)
        return _windowed(width, listed or tuple((layer + 1) % pattern != 0 for layer in range(num_layers)))
    if window is not Window.EVERY_LAYER and not fields.boolean("use_sliding_window", default=False):
        return (None,) * num_layers
    if window is Window.EVERY_LAYER and "sliding_window" not in fields.values:
        raise CheckpointError(f"{fields.source} has no sliding_window; it must be a number of tokens, or null for none")
    if fields.values.get("sliding_window") is None:
        return (None,) * num_layers
    width = fields.positive_int("sliding_window")
    if window in (Window.EVERY_LAYER, Window.EVERY_LAYER_IF_USED):
        return (width,) * num_layers
    return _windowed(width, _read_layer_types(fields, num_layers) or _by_max_layers(window, fields, num_layers))


def _windowed(width: int, has_window: tuple[bool, ...]) -> tuple[int | None, ...]:
    return tuple(width if is_windowed else None for is_windowed in has_window)


def _by_max_layers(window: Window, fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    max_window_layers = fields.whole_number("max_window_layers", minimum=0)
    if window is Window.EVEN_LAYERS:
        return tuple(layer % 2 == 0 and layer < max_window_layers for layer in range(num_layers))
    return tuple(layer >= max_window_layers for layer in range(num_layers))


def _read_layer_types(fields: ConfigFields, num_layers: int) -> tuple[bool, ...] | None:
    """Whether each layer has a window; None where config.json does not list them."""
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise CheckpointError(f"{fields.source}: layer_types must list {num_layers} layers, not {layer_types!r}")
    if unknown := set(map(str, layer_types)) - {SLIDING, FULL}:
        raise CheckpointError(
            f"{fields.source}: layer_types holds {', '.join(sorted(unknown))}; each must be {FULL} or {SLIDING}"
        )
    return tuple(layer_type == SLIDING for layer_type in layer_types)
