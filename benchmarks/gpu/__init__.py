"""The stages of benchmarks/bench_gpu.py, which runs each in a process of its own."""
