"""What came of a stage's command, told to Dagster: the same for every launcher.

Belongs here: the command line of a stage, its results as events, its failure as one line. Not here: starting anything.
"""

import re
from collections.abc import Iterator, Sequence

import dagster as dg

from assets_defs.launching import Launch, Results
from m2m.arguments import EXIT_CALL_AGAIN
from m2m.config import Profile
from m2m.stages import Stage

MAX_RETRIES = 20
LINES_KEPT = 40
"""Of the end of what a command says, for its failure."""


def stage_arguments(stage: Stage, profile: Profile, launch: Launch, shards: Sequence[str] | None) -> list[str]:
    """The arguments of `python -m m2m` for one launch."""
    return [
        *stage.argv,
        *("--config", str(profile.path.resolve())),
        *(("--shards", shard_ranges(shards)) if shards is not None else ()),
        *(("--force",) if launch.force else ()),
        *launch.overrides,
    ]


def shard_ranges(keys: Sequence[str]) -> str:
    """Partition keys as the command line takes them: `0-3,7`, however many they are."""
    numbers = sorted(int(key) for key in keys)
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or numbers[i + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def results(
    context: dg.AssetExecutionContext,
    stage: Stage,
    reported: Sequence[dg.MaterializeResult | dg.AssetCheckResult],
    exit_code: int,
    last_lines: Sequence[str],
    told: dict[str, dg.MetadataValue],
    *,
    why: str | None = None,
) -> Results:
    """Yield what the process reported, then fail the step if the process failed.

    Args:
        reported: what was heard over Pipes.
        last_lines: the end of its stderr.
        told: what the launcher knows of the launch, for the materialization.
        why: what the launcher knows better than the command of why it failed.

    Raises:
        dg.Failure: a non-zero exit code, with the command's own one-line error.
        dg.RetryRequested: the command was stopped after a checkpoint and goes on when called again.
    """
    for result in reported:
        if isinstance(result, dg.AssetCheckResult):
            yield result  # also of a failing stage: which promise was broken is what one wants to see
        elif exit_code == 0:
            yield from _materialization(context, result, told)
    if exit_code == 0:
        return
    why = why or _why(stage, exit_code, last_lines)
    if exit_code == EXIT_CALL_AGAIN:
        raise dg.RetryRequested(max_retries=MAX_RETRIES, seconds_to_wait=1) from dg.Failure(why)
    log = dg.MetadataValue.md("```\n" + "\n".join(last_lines) + "\n```")
    raise dg.Failure(why, metadata={**told, "exit_code": exit_code, "last_lines": log}, allow_retries=False)


def last_of_each(
    reported: Sequence[dg.MaterializeResult | dg.AssetCheckResult],
) -> list[dg.MaterializeResult | dg.AssetCheckResult]:
    """One result an asset and a check, of the many that the tasks of an array or a requeued job report.

    A broken promise counts before a kept one, the whole output before some of its shards, else the latest.
    """
    best: dict[object, dg.MaterializeResult | dg.AssetCheckResult] = {}
    for result in reported:
        if isinstance(result, dg.AssetCheckResult):
            key, known = (result.asset_key, result.check_name), best.get((result.asset_key, result.check_name))
            if isinstance(known, dg.AssetCheckResult) and _weight(known) > _weight(result):
                continue
            best[key] = result
        else:
            known = best.get(result.asset_key)
            if known and "not_whole_yet" in (result.metadata or {}) and "not_whole_yet" not in (known.metadata or {}):
                continue
            best[result.asset_key] = result
    return list(best.values())


def _materialization(
    context: dg.AssetExecutionContext, result: dg.MaterializeResult, told: dict[str, dg.MetadataValue]
) -> Iterator[dg.MaterializeResult]:
    """One report makes an event a partition; pictures are kept on the first of them, not 12,000 times."""
    metadata = {**(result.metadata or {}), **told}
    if context.has_partition_key or not context.assets_def.partitions_def or len(context.partition_keys) == 1:
        yield result._replace(metadata=metadata)
        return
    pictures = {name: value for name, value in metadata.items() if _holds_picture(value)}
    if pictures:
        context.add_asset_metadata(pictures, partition_key=context.partition_keys[0])
    yield result._replace(metadata={name: value for name, value in metadata.items() if name not in pictures})


def _holds_picture(value: object) -> bool:
    return isinstance(value, dg.MarkdownMetadataValue) and "](data:image/" in (value.md_str or "")


def _why(stage: Stage, exit_code: int, last_lines: Sequence[str]) -> str:
    """The command's own error: what follows the last `error:` on its stderr, or else its last line."""
    if exit_code < 0:
        killed = f"was killed by signal {-exit_code}"
        return f"{stage.key} {killed}{' (out of memory?)' if exit_code == -9 else ''}; what is whole is kept"
    text = "\n".join(last_lines)
    errors = re.split(r"^error: ", text, flags=re.MULTILINE)
    said = errors[-1].strip() if len(errors) > 1 else next((line for line in reversed(last_lines) if line.strip()), "")
    said = said.removeprefix(f"{stage.key}: ")
    return f"{stage.key} failed: {said or f'exit code {exit_code}, nothing said'}"


def _weight(check: dg.AssetCheckResult) -> int:
    if not check.passed:
        return 2 if check.severity == dg.AssetCheckSeverity.ERROR else 0  # a warning: not all shards are there yet
    return 1
