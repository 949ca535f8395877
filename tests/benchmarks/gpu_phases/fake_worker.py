"""A process that runs no phase: it answers a request with what a script of this test says, line by line.

python fake_worker.py SCRIPT: a JSON object from the number of the process to a list of messages; a message {"die": n}
ends the process with signal n, {"hang": true} waits for ever, {"torn": true} is half a message.
"""

import json
import os
import signal
import sys
from pathlib import Path

request = json.loads(sys.stdin.readline())
script = Path(sys.argv[1])
seen = script.with_suffix(".requests")
earlier = seen.read_text().splitlines() if seen.exists() else []
seen.write_text("\n".join([*earlier, json.dumps(request)]))
for message in json.loads(script.read_text())[len(earlier)]:
    if "die" in message:
        sys.stdout.flush()
        os.kill(os.getpid(), message["die"])
    elif "hang" in message:
        sys.stdout.flush()
        signal.pause()
    elif "torn" in message:
        sys.stdout.write('{"kind": "figu')
    else:
        sys.stdout.write(json.dumps(message) + "\n")
