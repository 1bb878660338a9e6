"""`python -m m2m` with the registry's own stages, inputs, checks and partitions, but a few bytes of work in each.

What is tested with it is the way of running: processes, Pipes, signals, locks and manifests are the real ones.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from toy_work import generate, train  # noqa: E402

from m2m import artifacts  # noqa: E402
from m2m.config import StageConfig  # noqa: E402
from m2m.errors import InputError  # noqa: E402
from m2m.stage_run import StageRun  # noqa: E402
from m2m.stages import STAGES, Stage  # noqa: E402

PNG = (  # one white pixel
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc\xf8\x0f\0\x01\x01\x01\0\x1b"
    b"\xb6\xeeV\0\0\0\0IEND\xaeB`\x82"
)


class Toy(StageConfig):
    """What a toy stage does beside its work."""

    shards: int = 1
    value: int = 1
    act: str = "work"


def toy(config: Toy, run: StageRun) -> None:
    """Write one file a shard; before that, do what `act` says."""
    print(f"{run.stage.key} on stdout", flush=True)
    print(f"{run.stage.key} on stderr", file=sys.stderr, flush=True)
    match config.act:
        case "fail":
            raise InputError("in.tsv:3: no tab between URL and caption")
        case "crash":
            raise ZeroDivisionError("a bug")
        case "sleep" | "sleep deaf":
            _sleep(run, 60, deaf=config.act == "sleep deaf")
        case "wait":
            _sleep(run, 0)
            while not (run.profile.outputs / "wake").exists():
                time.sleep(0.1)
        case "nap":
            _sleep(run, 8)
        case "sleep once" | "sleep deaf once" if not (run.out / "checkpoint").exists():
            (run.out / "checkpoint").write_text("halfway")
            _sleep(run, 200, deaf=config.act == "sleep deaf once")
        case "stop once" if not (run.out / "checkpoint").exists():
            (run.out / "checkpoint").write_text("halfway")
            sys.exit(75)
        case "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
    wanted = run.shards if run.shards is not None else range(config.shards)
    for shard in wanted if run.stage.partitioned else [0]:
        if config.act != "steps":
            artifacts.write_bytes(run.out / f"{shard:05d}.txt", str(config.value).encode())
        elif run.stage.partitioned:
            generate(run, shard)
        else:
            train(run)
    if config.act == "break promise":
        run.check(run.stage.checks[0], False, "found the opposite")
        return
    made = len(list(run.out.glob("0*.txt")))
    if run.stage.partitioned and made < config.shards:
        run.finish_later(f"{made} of {config.shards} shards are there")
        return
    run.finish_alone()
    (run.out / "white.png").write_bytes(PNG)
    run.picture("white", run.out / "white.png")
    run.count(files=made)
    run.figure(value=config.value)
    run.curve("loss", {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.5]})
    for check in run.stage.checks:
        run.check(check, True, "")


def _sleep(run: StageRun, seconds: float, *, deaf: bool = False) -> None:
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run.profile.outputs / "asleep").write_text(str(os.getpid()))
    time.sleep(seconds)


def install() -> None:
    """Put the toy into every stage."""
    for key, stage in STAGES.items():
        told = {name: getattr(stage, name) for name in Stage.__dataclass_fields__}
        STAGES[key] = Stage(**{**told, "function": f"{Path(__file__).stem}:toy"})


if __name__ == "__main__":
    install()
    from m2m.cli import main

    sys.exit(main())
