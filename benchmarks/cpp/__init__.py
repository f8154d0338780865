"""A package that ``lower`` wrote, run from C++; ``python -m benchmarks.cpp`` compiles it and compares."""

__all__: list[str] = []
