"""How long a thread of OpenMP waits before it sleeps. Import this before torch.

PyTorch's CPU products are shared out to threads by libgomp, whose idle threads spin for
milliseconds. Beside another program on the same cores that costs a factor of 5 to 10. A shorter
wait costs an idle machine nothing: tests/BENCH.md. libgomp reads it once, when it is loaded.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
