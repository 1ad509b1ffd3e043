"""Benchmarks: single steps, and the engine under load. Results are rows of figures, as tables and as JSON."""
