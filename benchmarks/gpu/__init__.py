"""The benchmark of a GPU: benchmarks/bench_gpu.py runs it, a stage a process."""
