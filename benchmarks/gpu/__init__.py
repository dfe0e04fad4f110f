"""`make gpu`: builds, tests, sanitizes and measures on a machine with an NVIDIA GPU, without a network.

One folder of results comes out: results.json (everything), table.md (what was measured beside the goals) and log.txt.
"""
