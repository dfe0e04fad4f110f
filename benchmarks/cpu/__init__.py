"""`make bench`: the kernels and the optimizers' steps beside their peers, on a CPU.

One folder of results comes out: results.json (everything), results.csv (the rows) and report.html (the same to read).
"""
