"""Shard generation killed (SIGKILL) at random moments, then finished: equal bytes, nothing made twice, nothing stray.

The tiny models; the moments are those at which the output is touched (before opening, renaming, removing a file) and,
in between, those at which a set is made. `python -m benchmarks.killed_generation [--moments 20]`
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "filter-captions": {"source": "m2m/tiny/data/captions.tsv", "limit": 12},
    "generate-sets": {
        "text_to_image": "m2m/tiny/weights/stable-diffusion",
        "shards": 4,
        "sets_per_shard": 2,
        "images_per_set": 2,
        "steps": 1,
        "store_images": "png",
        "compute": {"threads": 1},
    },
}


def generate(profile: str, outputs: str, notes: str, moment: int | None) -> None:
    """Run the stage, noting each set that is made; die (-9) at the `moment`-th time that something happens."""
    from m2m.cli import main
    from m2m.generation.image_sets import SetMaker

    os.environ["M2M_OUTPUTS"] = outputs
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    left = moment

    def happens() -> None:
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(name: str, args: tuple) -> None:
        if name in ("open", "os.rename", "os.remove", "os.link") and "generate-sets" in str(args[0]):
            happens()

    latents = SetMaker.latents

    def noting(self: SetMaker, caption_id: int, caption: str):
        made = latents(self, caption_id, caption)
        happens()
        handle = os.open(notes, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(handle, f"{caption_id}\n".encode())
        os.close(handle)
        return made

    SetMaker.latents = noting  # type: ignore[method-assign]
    sys.addaudithook(watch)
    raise SystemExit(main(["generate-sets", "--config", profile]))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def whole_shards(outputs: Path) -> set[int]:
    return {int(path.stem) for path in outputs.glob("*/generate-sets*/shards/[0-9]*.json")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from m2m.cli import main as m2m
    from m2m.config import project_root

    context = multiprocessing.get_context("forkserver")  # forked from a process that has imported, not computed
    context.set_forkserver_preload(["m2m.generation.image_sets"])
    chance = random.Random(args.seed)
    killed = differing = twice = stray = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = json.loads(json.dumps(SETTINGS))
        for section, key in (("filter-captions", "source"), ("generate-sets", "text_to_image")):
            settings[section][key] = str(project_root() / settings[section][key])
        profile = folder / "small.yaml"
        profile.write_text(json.dumps(settings))  # JSON is YAML

        def run(outputs: Path, notes: Path, moment: int | None) -> int | None:
            child = context.Process(target=generate, args=(str(profile), str(outputs), str(notes), moment))
            child.start()
            child.join()
            return child.exitcode

        def captions(outputs: Path) -> None:
            os.environ["M2M_OUTPUTS"] = str(outputs)
            m2m(["filter-captions", "--config", str(profile)])

        captions(folder / "whole")
        assert run(folder / "whole", folder / "whole.notes", None) == 0
        expected = tree(folder / "whole" / "small" / "generate-sets")
        per_shard = settings["generate-sets"]["sets_per_shard"]
        ids = [int(line) for line in (folder / "whole.notes").read_text().split()]
        outputs, notes, done = folder / "killed", folder / "killed.notes", 0
        captions(outputs)
        while killed < args.moments:
            standing = whole_shards(outputs)
            made_before = notes.read_text().split() if notes.exists() else []
            code = run(outputs, notes, chance.randint(1, 40))
            made = [int(line) for line in (notes.read_text().split() if notes.exists() else [])[len(made_before) :]]
            twice += sum(ids.index(i) // per_shard in standing for i in made)
            if code == -signal.SIGKILL:
                killed += 1
            if code == 0 or killed == args.moments:  # finish, compare, begin anew
                assert run(outputs, notes, None) == 0
                found = tree(outputs / "small" / "generate-sets")
                differing += sum(found.get(path) != content for path, content in expected.items())
                stray += len(set(found) - set(expected)) + len(list((outputs / "small").glob("generate-sets.*")))
                done += 1
                outputs, notes = folder / f"killed-{done}", folder / f"killed-{done}.notes"
                captions(outputs)
    print(
        f"{killed} kills over {done} generations: {differing} files differ, {twice} sets of whole shards were made "
        f"again, {stray} stray files"
    )
    figures = {"moments": killed, "generations": done, "differing": differing, "made_twice": twice, "stray": stray}
    ok = killed >= args.moments and not differing + twice + stray
    reach = {"moments": f">= {args.moments}", "differing": "0", "made_twice": "0", "stray": "0"}
    print(json.dumps({"name": "killed_generation", "figures": figures, "reach": reach, "ok": ok}))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
