"""Speed and exactness, measured; each module runs with ``python -m benchmarks.<name>``."""
