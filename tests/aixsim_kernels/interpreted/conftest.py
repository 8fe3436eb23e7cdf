"""Triton must know before its import that it is to interpret: see `test_interpreted.py`."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
