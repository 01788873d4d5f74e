"""Evaluation: benchmarks with intervals, and safety under a taxonomy of risks."""
