"""These tests run Triton in Python, on CPU tensors: only in a process that was started for it.

Triton reads `TRITON_INTERPRET` when it is first imported. `tests/kernels/test_interpreted.py` starts the processes.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
