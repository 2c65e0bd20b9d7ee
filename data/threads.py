"""What has to be set before torch is imported: every command begins with this.

PyTorch's CPU products are shared out to threads by libgomp, whose idle threads spin for
milliseconds. Beside another program on the same cores that costs more than half of the speed. A
shorter wait costs an idle machine little: tests/BENCH.md. libgomp reads it once, when it is loaded.

Importing takes seconds: Ctrl-C in one of our commands is no traceback then either. Nor is it lost
where Python would ignore it, in a destructor.
"""

import _thread
import os
import sys
from pathlib import Path
from threading import Timer

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


def tell_of(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; the same command goes on", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def interrupt_again(ignored):
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        Timer(0.1, _thread.interrupt_main).start()  # by then the destructor has returned
    else:
        sys.__unraisablehook__(ignored)


if Path(__file__).parent.parent in Path(sys.argv[0]).absolute().parents:
    sys.excepthook = tell_of
    sys.unraisablehook = interrupt_again
