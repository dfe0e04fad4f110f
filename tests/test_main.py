"""`python -m mbf_kernels`: what is installed, what works here, and a self-check."""

import os
import subprocess
import sys

import torch

import mbf_kernels


def main(**environment):
    command = [sys.executable, "-m", "mbf_kernels"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_it_tells_versions_backends_and_the_instruction_set():
    done = main()
    assert done.returncode == 0, done.stdout + done.stderr
    for fact in (mbf_kernels.__version__, torch.__version__, *mbf_kernels.backends()):
        assert fact in done.stdout
    if mbf_kernels.backends()["cpu"] == "available":
        assert mbf_kernels.native.cpu_isa() in done.stdout


def test_it_follows_the_environment():
    for isa in mbf_kernels.native.cpu_isas() if mbf_kernels.backends()["cpu"] == "available" else []:
        done = main(MBF_CPU_ISA=isa)
        assert done.returncode == 0 and isa in done.stdout
