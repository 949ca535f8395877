"""Stands in for the quantizer's command line: the last part of SRC names what it plays. Run as a script."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def say(event: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def succeed(output: Path) -> None:
    for done in range(4):
        say("progress", phase="blocks", done=done, total=3, seconds_left=float(3 - done))
    output.mkdir()
    say("done", output=str(output), report={"perplexity": {"original": 32.5, "quantized": 35.25}, "args": sys.argv[2:]})


def tell_all(output: Path) -> None:
    say("notice", message="resuming at block 3 of 3")
    layer = {"name": "model.layers.2.mlp.up_proj", "formula": "x^0.45", "plain": 0.5, "chosen": 0.25}
    say("block", block="model.layers.2", plain=0.75, chosen=0.5, kept="searched", layers=[layer])
    succeed(output)


def succeed_amid_noise(output: Path) -> None:
    os.write(1, b'\xff\xfe not text\n[1, 2]\n{"event": "dance"}\n{"event": "progress", "done": "many"}\n\n')
    os.write(1, b"x" * (17 * 2**20) + b"\n")
    os.write(2, b"warning: \xff noise\n" * 1000)
    succeed(output)


def fail(output: Path) -> None:
    say("failed", message="group size 128 does not divide the 576 in features of model.layers.0.self_attn.q_proj")
    sys.exit(2)


def crash(output: Path) -> None:
    raise MemoryError("no room for the Gram matrix")


def say_nothing(output: Path) -> None:
    pass


def hang(output: Path) -> None:
    say("progress", phase="calibration", done=1, total=32, seconds_left=None)
    while True:
        signal.pause()


def hang_with_child(output: Path) -> None:
    """The child holds the pipes open after this process is gone."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    say("progress", phase=str(child.pid), done=0, total=1, seconds_left=None)
    signal.pause()


def ignore_sigint(output: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hang(output)


def finish_on_sigint(output: Path) -> None:
    """The cancellation that comes too late: the checkpoint is there by the time the signal is handled."""

    def finish(number: int, frame: object) -> None:
        succeed(output)
        sys.exit(0)

    signal.signal(signal.SIGINT, finish)
    hang(output)


def name_signal(output: Path) -> None:
    """Leaves the name of the signal that ends it in a file beside the output."""

    def leave(number: int, frame: object) -> None:
        output.with_suffix(".signal").write_text(signal.Signals(number).name)
        sys.exit(130)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    hang(output)


PARTS = {
    part.__name__: part
    for part in (
        succeed,
        tell_all,
        succeed_amid_noise,
        fail,
        crash,
        say_nothing,
        hang,
        hang_with_child,
        ignore_sigint,
        finish_on_sigint,
        name_signal,
    )
}

if __name__ == "__main__":
    PARTS[Path(sys.argv[1]).name](Path(sys.argv[2]))
