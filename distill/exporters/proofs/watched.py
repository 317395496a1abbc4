"""A script that does not outlive who started it: `python watched.py SCRIPT JOB.json`, with a pipe as standard input, which
the system closes when its other end is gone, killed or not."""

import os
import runpy
import sys
import threading


def end_when_closed() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_when_closed, daemon=True).start()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
