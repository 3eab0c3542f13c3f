"""One rank of a run: `python -m shampoo3d.cli.train.worker OUTPUT`.

The environment sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from .log import Record, Report
from .settings import RunError, Settings, rank_log


def work(settings: Settings, report: Report) -> None:
    """Train with each optimizer of the settings, as the rank that the environment names; rank 0 reports."""
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.setdefault("LOCAL_RANK", os.environ["RANK"]))
    if settings.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed would compile a shared-memory operation for half a minute, which gains nothing at this size.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
    import deepspeed
    import torch
    import torch.distributed as dist

    from .text import read_text
    from .trainer import Trainer

    torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "nccl" if settings.device == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timedelta(minutes=5), verbose=False)
    text = read_text(settings.text, settings.context)
    for name in settings.optimizers:
        Trainer(name, settings, text, report if rank == 0 else silent).complete()
    dist.barrier()  # nobody leaves while another may still need the connection
    dist.destroy_process_group()


def silent(record: Record) -> None:
    """Report nothing: rank 0 reports for all ranks."""


def quiet(settings: Settings) -> int:
    """Redirect what any library prints to this rank's log file; return a descriptor of the former standard output."""
    stdout = os.dup(1)
    log = os.open(rank_log(settings.output, int(os.environ["RANK"])), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    return stdout


@contextmanager
def last_act(complain: Callable[[str], None]) -> Iterator[None]:
    """End this process with the body. An error in it goes to this rank's log, and to `complain` in one line.

    The process ends at once: an ordinary exit joins communication threads, which may wait for other ranks or abort.
    """
    code = 1
    try:
        yield
        code = 0
    except BaseException as error:
        traceback.print_exc()
        kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        complain(kind + " ".join(str(error).split())[:400])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    settings = Settings.load(Path(sys.argv[1]))
    reports = os.fdopen(quiet(settings), "w", buffering=1)

    def report(record: Record) -> None:
        print(json.dumps(record), file=reports)

    with last_act(lambda message: report({"event": "error", "message": message})):
        work(settings, report)


if __name__ == "__main__":
    main()
