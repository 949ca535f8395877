"""The phases of the GPU benchmark, what they share, and the process that runs them. `benchmarks/gpu.py` starts it."""
