"""What every test runs under: offline, one thread, property tests without a clock."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import torch
from hypothesis import HealthCheck, settings

# the tensors here are small: more threads only cost start-up time and compete with parallel test runs
torch.set_num_threads(1)

settings.register_profile(
    "fastattr",
    deadline=None,  # a busy machine is not a bug
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,  # one commit, one verdict; elsewhere every run looks at new examples
)
settings.load_profile("fastattr")
