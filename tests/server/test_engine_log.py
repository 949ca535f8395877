"""What an operator learns of the engine's deaths: the log's lines and the metric."""

from structlog.testing import capture_logs

from server.engine.request import EngineStatus, ModelInfo
from server.engine_log import EngineLog
from server.metrics import Metrics

MODEL = ModelInfo(
    model_path="/models/tiny",
    max_model_len=128,
    vocab_size=272,
    eos_token_ids=(2,),
    device="cpu",
    dtype="float32",
    num_blocks=8,
    block_size=16,
    kernels="native, amx",
    adapter_notes=("sql is taken as it is",),
    adapter_doubts=("support may add something else",),
)


def test_each_event_is_one_line_with_its_numbers() -> None:
    log = EngineLog()
    with capture_logs() as lines:
        log.spawned(12)
        log.became_ready(12, MODEL)
        log.pulse_changed(12, is_alive=False)
        log.pulse_changed(12, is_alive=True)
        log.ended(12, "it was killed", 3)
        log.restarting(0.5)
        log.given_up("it was restarted too often")
    assert lines == [
        {"event": "engine started", "log_level": "info", "pid": 12},
        {"event": "engine ready", "log_level": "info", "pid": 12, "kernels": "native, amx"},
        {"event": "adapter", "log_level": "info", "note": "sql is taken as it is"},
        {"event": "adapter in doubt", "log_level": "warning", "reason": "support may add something else"},
        {"event": "engine gives no sign of life", "log_level": "warning", "pid": 12},
        {"event": "engine answers again", "log_level": "info", "pid": 12},
        {"event": "engine ended", "log_level": "error", "pid": 12, "reason": "it was killed", "lost_requests": 3},
        {"event": "engine restarts", "log_level": "warning", "delay_seconds": 0.5},
        {"event": "engine given up", "log_level": "critical", "reason": "it was restarted too often"},
    ]


def test_restarts_are_counted_while_there_is_no_engine_too() -> None:
    metrics = Metrics(lambda: EngineStatus("restarting", "it was killed", None, None, num_restarts=2))
    assert b"\nawq_serve_engine_restarts_total 2.0\n" in metrics.render()
