"""`python -m m2m trace`: where a result came from, and what differs between two.

Belongs here: showing it. Not here: reading it back from disk (`m2m.provenance`).
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from m2m.arguments import add_profile_argument
from m2m.errors import ConfigError
from m2m.provenance import Made, find_output, flat, trace, verify
from m2m.released import as_json, changed, find_release, read_release

_SHORT = 12
_WIDTH = 120


def tree(made: Made) -> list[str]:
    """A few lines for each output, what it was made from indented below it; what was told before is not told again."""
    return list(_tree(made, "", set()))


def differences(a: Made, b: Made) -> list[str]:
    """What differs between two results and in everything behind them; the nearest output first."""
    left, right = ({node.key: node for node in made.each()} for made in (a, b))
    if a.key != b.key:
        left[b.key], right[b.key] = left.pop(a.key), right.pop(b.key)  # an evaluation of one model against another's
    lines = []
    for key in dict.fromkeys([*left, *right]):
        if key not in left or key not in right:
            lines.append(f"{key}: only behind {'the second' if key not in left else 'the first'}")
            continue
        facts = [_facts(side[key]) for side in (left, right)]
        names = sorted(set(facts[0]) | set(facts[1]), key=_kind)
        found = [
            f"  {name}: {_told(one)} -> {_told(two)}"
            for name in names
            if (one := facts[0].get(name)) != (two := facts[1].get(name))
        ]
        lines += [f"{key}:", *found] if found else []
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile_argument(parser)
    told = "an output's folder, a file in it (a report, a checkpoint), an exported folder, or a stage: pretrain@self"
    parser.add_argument("result", nargs="?", help=told)
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what differs between two results")
    parser.add_argument("--verify", action="store_true", help="read every byte on the way again")
    parser.add_argument("--json", action="store_true", help="print everything that is known, as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Exits with 1 where bytes are not what they were when they were recorded."""
    if (args.result is None) == (args.diff is None):
        raise ConfigError("trace takes one result, or --diff and two")
    if args.diff:
        a, b = (_found(text, args.config)[0] for text in args.diff)
        print("\n".join(differences(a, b)) or "nothing differs")
        return 0
    made, read_again = _found(args.result, args.config)
    files, broken = read_again() if args.verify else (0, [])
    if args.json:
        print(json.dumps({"outputs": as_json(made), "broken": broken}, indent=1, ensure_ascii=False))
        return 1 if broken else 0
    print("\n".join(tree(made)))
    nodes = list(made.each())
    gaps = sum(len(node.gaps) for node in nodes)
    sources = {source.digest for node in nodes for source in node.sources}
    print(f"{len(nodes)} outputs, {len(sources)} sources, {gaps} gaps")
    if args.verify:
        print("\n".join([f"{files} files read again; {len(broken)} things are not as they were", *broken]))
    return 1 if broken else 0


def _found(text: str, config: str | None) -> tuple[Made, Callable[[], tuple[int, list[str]]]]:
    """What a user means, and what reads its bytes again: how many files there are, and what of them does not hold."""
    if folder := find_release(Path(text)):
        return read_release(folder), lambda: changed(folder)
    profile, key = find_output(text, config)
    made = trace(profile, key)
    files = sum(len(node.manifest.files) for node in made.each() if node.manifest)
    return made, lambda: (files, verify(made, profile))


def _tree(made: Made, indent: str, told: set[str], name: str = "") -> Iterator[str]:
    label = f"{indent}{name} = {made.key}" if name else f"{indent}{made.key}"
    if made.key in told:
        yield f"{label} (above)"
        return
    told.add(made.key)
    inner = f"{indent}  "
    if made.manifest is not None:
        yield f"{label}: {made.folder}"
        yield f"{inner}fingerprint {made.manifest.fingerprint[:_SHORT]}, manifest {made.manifest.digest[:_SHORT]}"
        yield from (f"{inner}{line}" for line in _run_lines(made, told))
        read = {source.setting for source in made.sources}
        settings = {name: value for name, value in flat(made.manifest.config).items() if name not in read}
        seeds = {name: settings.pop(name) for name in list(settings) if name.rpartition(".")[2].endswith("seed")}
        yield from (f"{inner}{line}" for said in (seeds, settings) for line in _wrapped(said, _WIDTH - len(inner)))
    else:
        yield label
    yield from (f"{inner}GAP: {gap}" for gap in made.gaps)
    for source in made.sources:
        digest = "" if source.path == source.digest else f" (sha256 {source.digest[:_SHORT]})"
        yield f"{inner}{source.setting} = {source.path or '?'}{digest}"
    for input_name, of in made.inputs.items():
        yield from _tree(of, inner, told, input_name)


def _wrapped(settings: dict[str, Any], width: int) -> list[str]:
    said = ", ".join(f"{name} {'none' if value is None else value}" for name, value in settings.items())
    return textwrap.wrap(said, max(width, 40), break_long_words=False, break_on_hyphens=False)


def _run_lines(made: Made, told: set[str]) -> Iterator[str]:
    run = made.run
    if not run:
        return
    git = run.get("git", {})
    state = {None: "", True: ", with changes that were not committed", False: ", clean"}[git.get("dirty")]
    more = f", the last of {len(made.runs)} runs" if len(made.runs) > 1 else ""
    jobs = "".join(f", {name} {value}" for name, value in run.get("job", {}).items())
    yield f"made {run.get('started')} in {run.get('seconds', 0):g} s{more}{jobs}"
    yield f"code {(git.get('revision') or 'not under git')[:_SHORT]}{state}"
    packages = ", ".join(f"{name} {version}" for name, version in run.get("packages", {}).items())
    machine = run.get("machine", {})
    hardware = "".join(f", {name} {machine[name]}" for name in machine if name not in ("python", "system"))
    on = f"on {machine.get('system')}{hardware}, Python {machine.get('python')}, {packages}"
    if on not in told:  # most of a chain is made in one place
        told.add(on)
        yield on


def _facts(made: Made) -> dict[str, Any]:
    """All that can be compared of one output, by name."""
    if made.manifest is None:
        return {"output": "not whole"}
    sources = {source.setting: source for source in made.sources}
    said: dict[str, Any] = {"stage version": made.manifest.version}
    for name, value in flat(made.manifest.config).items():
        if name in sources:
            said[f"data {name}"] = (sources[name].path, sources[name].digest[:_SHORT])
        else:
            said[f"config {name}"] = value
    said |= {f"data {name}": digest[:_SHORT] for name, digest in made.manifest.inputs.items()}
    said |= {f"count {name}": value for name, value in made.manifest.counts.items()}
    said |= {f"file {of.path}": of.sha256[:_SHORT] for of in made.manifest.files}
    run = made.run
    said |= {f"code {name}": value for name, value in run.get("git", {}).items()}
    said |= {f"package {name}": version for name, version in run.get("packages", {}).items()}
    return said | {f"machine {name}": value for name, value in run.get("machine", {}).items()}


def _kind(name: str) -> tuple[int, str]:
    kinds = ["output", "stage", "config", "data", "code", "package", "machine", "count", "file"]
    return kinds.index(name.split(" ")[0]), name


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(str(part) for part in value if part is not None)
    return "(none)" if value is None else str(value)
