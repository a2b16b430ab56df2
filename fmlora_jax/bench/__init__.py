"""Benchmarks: FLOPs, time and memory of a training step beside their floors."""
