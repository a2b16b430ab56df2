"""Continual learning on one frozen ViT: FM-LoRA and its rivals, in JAX."""

import time

# when a program of this package began, but for the start of Python itself: some hundredths of a
# second. The time of the process would hold what its launcher did before, such as installing
BEGAN = time.monotonic()
