"""Settings for every test: no network, no spinning threads, and examples that do not depend on the machine's speed."""

import os

from hypothesis import settings

# Before anything imports torch, tokenizers or huggingface_hub.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# No deadline: nothing is timed inside the suite. In CI the examples are always the same ones.
settings.register_profile("diptych", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("diptych")
