"""Runs the program `sys.argv[1]` with the arguments after it, and ends the process at once when it is done.

gloo's threads, which DTensor's caches keep alive after `destroy_process_group`, can abort a process that ends
later (pytorch#190489).
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
