"""Start the processes of a run on this host, pass on what they report, and end them all together."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from types import TracebackType

from .log import Record, Report
from .settings import RunError, Settings, rank_log

GRACE_SECONDS = 5.0
"""The time between asking a process to end and killing it."""


def launch(settings: Settings, report: Report) -> None:
    """Run `settings` on new processes of this host until all are done.

    Raises:
        RunError: a process died; the message says which, how, and what to do. The others are ended.
    """
    with _Processes(settings) as processes:
        processes.watch(report)


class _Processes:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.messages: queue.Queue[tuple[int, Record | None]] = queue.Queue()
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> _Processes:
        port = free_port()
        try:
            for rank in range(self.settings.world):
                self._start(rank, port)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._end()

    def _start(self, rank: int, port: int) -> None:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.settings.world, "MASTER_PORT": port}
        variables = {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-m", f"{__package__}.worker", str(self.settings.output)]
        with rank_log(self.settings.output, rank).open("a") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | variables | {"OMP_NUM_THREADS": str(self.settings.threads)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Out of reach of the terminal's Ctrl-C: this process decides when they end.
                start_new_session=True,
            )
        self.processes.append(process)
        threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()

    def _listen(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):
                self.messages.put((rank, json.loads(line)))
        self.messages.put((rank, None))

    def watch(self, report: Report) -> None:
        """Pass reports on until every process has succeeded; raise when the first one fails."""
        errors: dict[int, str] = {}
        running = len(self.processes)
        while running:
            rank, record = self.messages.get()
            if record is None:
                running -= 1
                if self.processes[rank].wait() != 0:
                    raise RunError(self._failure(rank, errors))
            elif record["event"] == "error":
                errors[rank] = record["message"]
            else:
                report(record)

    def _failure(self, ended: int, errors: dict[int, str]) -> str:
        """Say what went wrong first: ranks that lose a peer fail, too, and may be heard before it.

        Signals come from outside, but for SIGABRT: with it libraries end a process that has lost a peer.
        """
        codes = [process.poll() or 0 for process in self.processes]
        killed = [rank for rank, code in enumerate(codes) if code < 0 and code != -signal.SIGABRT]
        rank = next(iter(killed or errors), ended)
        code = codes[rank]
        message = None if killed else errors.get(rank)
        log = rank_log(self.settings.output, rank)
        name = f"rank {rank} of {self.settings.world}"
        advice = f"continue with: shampoo3d train --resume --output {self.settings.output}"
        if message:
            return f"{name} stopped: {message} (details in {log})"
        if code < 0:
            hint = ", perhaps for lack of memory (try a smaller --batch)" if code == -signal.SIGKILL else ""
            return f"{name} was killed by {signal.Signals(-code).name}{hint}; the others were ended; {advice}"
        return f"{name} ended with exit code {code} (details in {log}); {advice}"

    def _end(self) -> None:
        running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
