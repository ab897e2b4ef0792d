"""A command of a check: run with the libraries that are there, within the time that is left, and logged. Standard library alone."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

FOLDER, OUT = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ROOT = pathlib.Path(__file__).resolve().parents[2]
INCIPIT = str(FOLDER / "incipit")
BEGAN = time.monotonic()
LIMIT = float(os.environ.get("INCIPIT_CHECK_SECONDS", 540))


def libraries() -> str:
    """Where CUDA's libraries are: the driver's, those of an installed toolkit, and those that PyTorch brought. The stand-in for a driver
    must not be there."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/usr/local/nvidia"]
    places = [pathlib.Path(home) / "lib64" for home in homes if home]
    places += [lib for root in sys.path if root for lib in sorted(pathlib.Path(root).glob("nvidia/*/lib"))]
    given = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    found = [str(place) for place in places if place.is_dir()] + [place for place in given if place]
    return ":".join(place for place in found if "stand-in" not in place)


# What the driver translates for this GPU, for all programs of a check.
TRANSLATED = tempfile.TemporaryDirectory()
# For our programs alone: PyTorch finds its own.
OURS = os.environ | {
    "LD_LIBRARY_PATH": libraries(), "CARGO_MANIFEST_DIR": str(ROOT / "tests"), "CUDA_CACHE_PATH": TRANSLATED.name, "RUST_BACKTRACE": "1"
}  # fmt: skip
# What is said where a device has failed. cuBLASLt has words of its own for it.
LOST = "CUDA_ERROR_(?!OUT_OF_MEMORY)|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"


class Ran:
    """A command that has ended, perhaps by its time limit. It is killed with all processes that it started."""

    def __init__(self, part: str, command: list[str], limit: float, settings: dict | None = OURS, cwd: pathlib.Path = ROOT) -> None:
        left = LIMIT - (time.monotonic() - BEGAN)
        self.out = self.err = self.why = ""
        self.code, limit, start = 125, min(limit, left), time.monotonic()
        if left < 5:
            self.why = "no time was left"
            return
        with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
            try:
                process = subprocess.Popen(
                    command, cwd=cwd, env=settings, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )  # fmt: skip
                try:
                    self.code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    self.code, self.why = 124, f"not done within {limit:.0f} s"
                    os.killpg(process.pid, signal.SIGKILL)
                    self.given_up(process)
            except OSError as error:
                self.code, self.why = 127, str(error)
            for file, name in ((out, "out"), (err, "err")):
                file.seek(0)
                setattr(self, name, file.read())
        lines = [line.strip() for line in (self.err + "\n" + self.out).splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"error|.*Error\b|.*error while loading", line)] or lines
        self.why = self.why or (f"code {self.code}: {told[-1][:160]}" if told and self.code else f"code {self.code}")
        with (OUT / "check.log").open("a") as log:
            words = " ".join(word if len(word) < 300 else "..." for word in command)
            log.write(f"\n===== {part}: {words}\n===== {time.monotonic() - start:.1f} s, code {self.code}\n{self.out}\n----- stderr\n{self.err}\n")

    def lost_device(self) -> bool:
        """Whether it ended as one does whose device has failed: that shows at a later call than the one that is to blame."""
        return self.code < 0 or bool(re.search(LOST, self.out + self.err))

    @staticmethod
    def given_up(process: subprocess.Popen) -> None:
        """One that waits within the driver ends when the driver lets it."""
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            pass

    def json(self) -> dict | None:
        """What it printed, if it ended well."""
        try:
            return json.loads(self.out) if self.code == 0 else None
        except ValueError:
            self.why = "what it printed is no JSON"
            return None
