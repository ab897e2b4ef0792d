"""A coordinator and a worker on this machine, `incipit up`, asked as a program asks them. Standard library alone."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Callable


class LocalCluster:
    """A coordinator and one backbone on this machine, from the moment that this is READY to the end of the block.

    `flags` are those of the backbone, as `--device`. One rank is one of `incipit up`; several, over `collective`, have a worker each, and to
    NCCL these look like machines, so that they can share a GPU.
    """

    def __init__(self, program: str, model: str, directory: pathlib.Path, flags: list[str], limit: float = 600, ranks: int = 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.program, self.limit, self.url = program, limit, f"http://{address}"
        self.processes: list[subprocess.Popen] = []
        began = time.monotonic()
        try:
            if ranks == 1:
                self.start("up", "--data", str(directory / "up"), "--listen", address, "--model", model, "--slots", "1", *flags)
            else:
                self.start("coordinator", "--data", str(directory / "up"), "--listen", address, "--insecure", "--model-root", model)
                for rank in range(ranks):
                    state = str(directory / f"worker-{rank}")
                    worker = ["worker", "--coordinator", self.url, "--name", f"w{rank}", "--slots", "1", "--state-dir", state]
                    self.start(*worker, settings=os.environ | {"NCCL_HOSTID": f"rank-{rank}"})
                self.wait_for("coordinator", lambda: self.answers("workers", "list"), 60)
                self.ask("backbone", "create", "--name", "backbone", "--model", model, *flags)
            self.wait_for("backbone that is READY", lambda: self.backbone().get("state") == "BACKBONE_STATE_READY", limit)
        except BaseException:
            self.__exit__()
            raise
        self.seconds_to_ready = time.monotonic() - began

    def start(self, *command: str, settings: dict | None = None) -> None:
        self.processes.append(subprocess.Popen([self.program, *command, "-q"], env=settings, stdin=subprocess.DEVNULL))

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        # Workers end before the coordinator, which takes what they have saved.
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *arguments: str) -> list[dict]:
        """What a command prints as JSON: a document a line, or one over all lines."""
        command = [self.program, *arguments, "--coordinator", self.url, "--json"]
        ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=self.limit)
        if ran.returncode:
            raise RuntimeError(f"incipit {' '.join(arguments[:3])} ended with {ran.returncode}: {ran.stderr.strip()[-200:]}")
        decoder, place, found = json.JSONDecoder(), 0, []
        while place < len(ran.stdout):
            document, place = decoder.raw_decode(ran.stdout, place)
            found.append(document)
            place += len(ran.stdout[place:]) - len(ran.stdout[place:].lstrip())
        return found

    def wait_for(self, what: str, holds: Callable[[], bool], limit: float) -> None:
        end = time.monotonic() + limit
        while not holds():
            for process in self.processes:
                if process.poll() is not None:
                    raise RuntimeError(f"incipit {process.args[1]} has ended with {process.returncode}")
            if time.monotonic() > end:
                raise RuntimeError(f"there was no {what} within {limit:.0f} s")
            time.sleep(0.02)

    def answers(self, *arguments: str) -> bool:
        try:
            return bool(self.ask(*arguments))
        except RuntimeError:
            return False

    def backbone(self) -> dict:
        """The one that there is; nothing of it while nobody answers."""
        try:
            found = self.ask("backbone", "list")[0]
        except RuntimeError:
            return {}
        if found and found[0]["state"] == "BACKBONE_STATE_FAILED":
            raise RuntimeError(f"the backbone has failed: {found[0].get('message')}")
        return found[0] if found else {}

    def job(self, name: str) -> dict:
        return self.ask("job", "get", name)[0]

    def times(self, name: str) -> list[float]:
        """When each step of a job was measured, in seconds since 1970, once it has ended."""
        points = [document["point"] for document in self.ask("job", "watch", name) if "point" in document]
        return [seconds(point["time"]) for point in points if "training" in point]


def seconds(moment: str) -> float:
    """A moment of the API, in UTC, in seconds since 1970. Its fraction may have more digits than Python reads."""
    whole, _, fraction = moment.removesuffix("+00:00").partition(".")
    begun = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.timezone.utc)
    return begun.timestamp() + float(f"0.{fraction or 0}")
