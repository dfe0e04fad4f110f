"""The folder of one run. Every part records itself in results.json as it goes, so that a run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "mbf_kernels", "python", "benchmarks", "tests")
SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h", ".def"}


class Results:
    def __init__(self, folder: Path, sources: str):
        self.folder, self.sources = folder, sources
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log = folder / "results.json", folder / "log.txt"

    def load(self) -> dict:
        return json.loads(self.file.read_text()) if self.file.exists() else {"parts": {}}

    def part(self, name: str) -> dict:
        """What this version of the sources recorded of a part; empty if nothing."""
        record = self.load()["parts"].get(name, {})
        return record if record.get("sources") == self.sources else {}

    def save(self, name: str, record: dict) -> None:
        """Replaces the file in one move: a run that is cut off leaves the old one or the new one."""
        results = self.load()
        results["parts"][name] = {"sources": self.sources, **record}
        draft = self.file.with_suffix(".tmp")
        draft.write_text(json.dumps(results, indent=1))
        draft.replace(self.file)

    def run(
        self, command: list[str], seconds: float, env: dict | None = None, *, echo: bool = False, tag: str = ""
    ) -> tuple[int, str]:
        """Runs a command in the repository; its output goes to the log as it comes. Returns its status and output.

        After `seconds` the command and what it started are killed: then the status is 124. `tag` begins every line of
        the log, for commands that run side by side.
        """
        output: list[str] = []
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_environment() | (env or {}), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip

        def read() -> None:
            with self.log.open("a") as log:
                log.write(f"\n{tag}$ {' '.join(command)}\n")
                for line in process.stdout:
                    output.append(line)
                    log.write(tag + line)
                    log.flush()
                    if echo:
                        print(line, end="", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = 124
        finally:  # also when interrupted
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # all of it has ended
        process.wait()
        reader.join(timeout=5)
        return status, "".join(output)


def child_environment() -> dict[str, str]:
    """The two packages importable from the tree; this Python's own tools and the CUDA toolkit's on the PATH."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *cuda_folders()]
    inherited = {name: value for name, value in os.environ.items() if name != "MBF_BACKEND"}
    return (
        {"TRITON_CACHE_DIR": str(ROOT / "build" / "gpu" / "triton")}
        | inherited
        | {
            "PATH": os.pathsep.join(folders),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "PIP_NO_INDEX": "1",  # whatever is started from here stays off the network
        }
    )


def cuda_folders() -> list[str]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return [str(Path(home) / "bin") for home in homes if home]


def digest(root: Path = ROOT) -> str:
    """A name for the state of the sources, committed or not, with or without git."""
    files = [path for folder in SOURCES for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    files += [root / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml")]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]
