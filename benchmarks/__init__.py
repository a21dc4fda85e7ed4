"""Benchmark suites of adakernels: run them with ``python -m adakernels bench`` from a source checkout."""
