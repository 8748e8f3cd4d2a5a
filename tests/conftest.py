"""What every test needs."""

from __future__ import annotations

import torch

# Ranks are forked from this process, and a child of a process that has run torch on several threads
# hangs in its own first parallel region (see suite/testbeds/local.py).
torch.set_num_threads(1)
