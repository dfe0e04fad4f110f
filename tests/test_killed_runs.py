"""A run that is killed again and again, at any moment, ends with the bits of one that nobody disturbs."""

import multiprocessing
import pickle
import random
import signal
import time
import zipfile

import torch
from killed_run import CHECKPOINT, PHASES, train

from mbf_kernels.testing import assert_bitwise

KILLS = 50
SERVER = multiprocessing.get_context("forkserver")  # forks children that have imported torch: milliseconds each
SERVER.set_forkserver_preload(["torch._dynamo", "mbf_optim"])


class Life:
    """A process that trains in ``folder``, and what it tells."""

    def __init__(self, folder, until=None):
        self._ear, mouth = SERVER.Pipe(duplex=False)
        self._process = SERVER.Process(target=train, args=(folder, mouth, until), daemon=True)
        self._process.start()
        mouth.close()
        self.told = []

    def listen(self):
        """Whether it has told something more."""
        try:
            self.told.append(self._ear.recv())
        except (EOFError, pickle.UnpicklingError):  # it is gone, perhaps in the middle of a word
            return False
        return True

    def kill(self, phase, count, delay):
        """At the ``count``-th time that it says ``phase``, after ``delay`` seconds."""
        while count and self.listen():
            count -= self.told[-1][0] == phase
        time.sleep(delay)
        self._process.kill()

    def end(self):
        """Listens to the rest, and returns the exit code."""
        while self.listen():
            pass
        self._process.join()
        self._ear.close()
        return self._process.exitcode


def assert_same(actual, expected):
    """Tensors by their bits, everything else by its value."""
    if isinstance(expected, torch.Tensor):
        return assert_bitwise(actual, expected)
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            assert_same(actual[name], expected[name])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    else:
        assert actual == expected


def is_torn(path):
    """Whether it has a beginning, but not the directory with which torch.save ends."""
    return path.stat().st_size > 0 and not zipfile.is_zipfile(path)


def test_killed_runs(tmp_path):
    draw = random.Random(0)
    disturbed, quiet = tmp_path / "disturbed", tmp_path / "quiet"
    disturbed.mkdir()
    quiet.mkdir()
    lives = []
    for _ in range(KILLS):
        lives.append(Life(disturbed))
        phase, delay = draw.choice(PHASES), draw.choice([0, draw.uniform(0, 3e-3)])  # seconds: about as long as a step
        count = draw.randint(1, 150 if phase == "write" else 12)  # a checkpoint has about 50 writes
        lives[-1].kill(phase, count, delay)
        assert lives[-1].end() == -signal.SIGKILL
    last = Life(disturbed, until=lives[-1].told[-1][1] + 10)
    assert last.end() == 0
    lives.append(last)

    reached = [life.told[-1][1] for life in lives]
    started = [life.told[0][1] for life in lives]
    lost = [before - after for before, after in zip(reached, started[1:], strict=False)]
    # That the kills came at all kinds of moments:
    assert sum(steps > 0 for steps in lost) > KILLS / 4 and len(set(lost)) > 2
    assert {life.told[-1][0] for life in lives} >= set(PHASES)
    assert any(is_torn(path) for path in disturbed.glob("*.unfinished"))

    undisturbed = Life(quiet, until=reached[-1])
    assert undisturbed.end() == 0
    assert_same(*(torch.load(folder / CHECKPOINT, weights_only=True) for folder in (disturbed, quiet)))
