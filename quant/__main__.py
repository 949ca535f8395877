"""`python -m quant`: the quantizer's command line."""

import os
import signal

# until there is something to clean up, Ctrl-C just ends the program, as it does while a program is being loaded
signal.signal(signal.SIGINT, signal.SIG_DFL)
# torch's threads wait for each other by spinning unless told otherwise before it is loaded; on a machine that is busy
# with anything else (the server, for one) that takes six times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from quant.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
