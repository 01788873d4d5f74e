"""Evaluation: benchmarks with intervals, baselines, and safety under a taxonomy of risks."""
