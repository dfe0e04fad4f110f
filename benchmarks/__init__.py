"""Training problems and measurements, run from the repository's root: `python -m benchmarks.demo`."""
