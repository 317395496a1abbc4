"""A runner of scripts that ends when its parent process ends: `python watched.py SCRIPT JOB.json`.

Standard input is a pipe from the parent. The system closes it when the parent ends or is killed.
"""

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
