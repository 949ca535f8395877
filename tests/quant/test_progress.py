"""Progress: the estimate of the time left, and the JSON lines that the job service reads."""

import io
import json

from quant.progress import JsonLines, ProgressMeter
from quant.report import BlockError, LayerLoss


def test_the_time_left_is_that_of_the_phase_at_its_speed_so_far() -> None:
    heard: list[tuple[str, int, int, float | None]] = []
    clock = iter([0.0, 10.0, 40.0, 41.0])

    def listen(phase: str, done: int, total: int, seconds_left: float | None) -> None:
        heard.append((phase, done, total, seconds_left))

    meter = ProgressMeter(listen, clock=lambda: next(clock))
    meter.report("quantize", 0, 4)
    meter.report("quantize", 1, 4)
    meter.report("quantize", 2, 4)
    meter.report("evaluate", 0, 2)
    assert heard == [
        ("quantize", 0, 4, None),
        ("quantize", 1, 4, 30.0),
        ("quantize", 2, 4, 40.0),
        ("evaluate", 0, 2, None),
    ]


def test_each_event_is_one_json_object_on_a_line() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream)
    lines.on_progress("quantize", 1, 30, 12.345)
    lines.on_progress("load", 0, 1, None)
    lines.on_notice("resuming at block 3 of 30")
    layer = LayerLoss("model.layers.2.mlp.up_proj", "x^0.45", 0.5, 0.25)
    lines.on_block(BlockError("model.layers.2", 0.75, 0.5, "searched"), [layer])
    lines.on_done("out", {"bits_per_weight": 4.3})
    lines.on_failed("no such model\nat all")
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {"event": "progress", "phase": "quantize", "done": 1, "total": 30, "seconds_left": 12.3},
        {"event": "progress", "phase": "load", "done": 0, "total": 1, "seconds_left": None},
        {"event": "notice", "message": "resuming at block 3 of 30"},
        {
            "event": "block",
            "block": "model.layers.2",
            "plain": 0.75,
            "chosen": 0.5,
            "kept": "searched",
            "layers": [{"name": "model.layers.2.mlp.up_proj", "formula": "x^0.45", "plain": 0.5, "chosen": 0.25}],
        },
        {"event": "done", "output": "out", "report": {"bits_per_weight": 4.3}},
        {"event": "failed", "message": "no such model\nat all"},
    ]
