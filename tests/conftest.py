"""Settings for every test, made before torch is imported."""

import os

from hypothesis import settings

# Tests start several ranks on few cores: more threads a rank would only fight each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

# No deadline: no test depends on how busy the machine is. In CI the same examples each time.
settings.register_profile("suite", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("suite")
