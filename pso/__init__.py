"""PSO-bench's core: samplers, objectives, policy and the tuning loop."""

import os

from pso.torchvision_operators import install

# transformers announces on import that it does without torchvision, which this project never uses
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
install()  # the official scorer packages do use it
