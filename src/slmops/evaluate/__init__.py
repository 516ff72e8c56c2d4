"""Judging: metrics, statistics, predictions, latency and memory, and the report that says what came out."""
