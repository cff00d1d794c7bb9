import pso  # noqa: F401  before any module here imports transformers
