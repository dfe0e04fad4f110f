"""How the figures came about: said in the report and in the documentation."""

from benchmarks.methods import LR
from benchmarks.peers import T2

NOTES = (
    "All that are compared run in one process, their samples interleaved over the same stretch of time. Times are "
    "medians, with the 20th and the 80th percentile; where a step does rare work every k-th time, they are means over "
    "whole periods, and its worst step is shown.",
    "Every op and every peer's call is compared with float64 before it is timed, on a sample of its blocks; of every "
    "optimizer the first steps of two layers. The tolerances are derived in benchmarks/ops.py and "
    "benchmarks/methods.py. Muon (it rounds to bfloat16) and the libraries' optimizers are only required to leave "
    "finite weights.",
    "x copy: the time over that of a plain copy (torch's copy_) of as many bytes as the call must move, in the same "
    "run. Of an op those are F, the vectors and info once; of a step, state and weights read and written, gradients "
    "read.",
    f"Kernel peers do the fused op's work on dense float32 blocks, except the product with an old inverse: it neither "
    f"updates nor factors. The paper's authors' code takes such a product at every step and inverts every {T2}-th. "
    "Each LAPACK call of NumPy and SciPy has one thread: on small matrices more only wait for each other.",
    f"Optimizers: learning rate {LR:g}, otherwise their defaults. torch's are fused, but Muon has no such form; it "
    "takes 2-D tensors only, and AdamW the rest. pytorch_optimizer's ScalableShampoo and SOAP refresh every 10th step "
    "(Shampoo's default of 1000 would hide its worst step), heavyball's every 2nd, its default. heavyball runs "
    "uncompiled: on a CPU its compilation takes minutes for a small network and fails for some of its optimizers.",
    "Python and dispatch: the time of MBF's step with its native launches replaced by nothing; beside it whole steps "
    "of all on as many tensors of one element each, where next to nothing is left to compute.",
    "Training iterations: forward, backward and step on the training problems, all methods in turn. Of methods that "
    "look at layers three kinds are timed: most; those that update the statistics, with a backward pass of drawn "
    "targets; and those that make the inverses anew. An iteration is their average at the default intervals. K-BFGS "
    "evaluates every batch twice. Bytes of a step: state and weights read and written, gradients read.",
    "Memory: steady is every storage that the optimizer's state holds; peak is the most that its first steps, "
    "rare work included, hold at once through torch's CPU allocator, state included. Scratch that native code takes "
    "elsewhere is not seen: our kernels' is one buffer a thread, less than a megabyte; LAPACK's is not known.",
)
