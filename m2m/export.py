"""`python -m m2m export`: a trained model as a folder of the Hugging Face hub's layout, and there by option.

Belongs here: the folder, its checksums, the upload. Not here: what the card says (`m2m.release_card`).
"""

import argparse
import os
import shutil
from pathlib import Path

from m2m import artifacts
from m2m.arguments import add_profile_argument
from m2m.errors import ArtifactError, InputError, M2MError
from m2m.pipelines.model_card import CARD
from m2m.provenance import Made, find_output, trace
from m2m.release_card import licence_of, measured, release_card
from m2m.released import PROVENANCE, SUMS, as_json
from m2m.stages import STAGES

_OURS = {artifacts.MANIFEST, artifacts.SUMMARY, "training_log.jsonl"}
"""Files of a training's output that are no part of the model; provenance.json holds what they say."""


class UploadFailed(M2MError):
    """The hub did not take the folder. The folder itself is whole."""


def export(text: str, out: Path, *, config: str | None = None, licence: str | None = None) -> Made:
    """Write a model's folder: weights and configs as they are, the card, where it all came from, checksums.

    Args:
        text: the model: its folder, a file in it, or its stage.
        out: a new or empty folder, or one that an export wrote, which is replaced.

    Raises:
        InputError: not a trained model, or `out` holds something else.
        ArtifactError: its files are not those of its manifest.
        ConfigError: no licence is known.
    """
    profile, key = find_output(text, config)
    made = trace(profile, key)
    if STAGES[key].group != "models":
        raise InputError(f"{made.folder} is the output of {key}; only trained models can be exported")
    manifest = artifacts.require_whole(made.folder, STAGES[key].make_command(profile))
    if found := artifacts.faults(made.folder, manifest, content=True):
        raise ArtifactError(f"{made.folder} is damaged: {'; '.join(found[:3])}")
    if broken := [gap for node in made.each() if node.manifest is None for gap in node.gaps]:
        raise ArtifactError(f"what {key} was made from is not here: {broken[0]}")
    card = release_card(made, profile, licence_of(made, profile, licence), measured(made, profile))
    if out.exists() and not (out / SUMS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something that no export wrote; name another folder")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for record in manifest.files:
        if record.path not in _OURS:
            target = partial / record.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made.folder / record.path, target)
    (partial / CARD).write_text(card, encoding="utf-8")
    artifacts.write_json(partial / PROVENANCE, as_json(made))
    sums = "".join(f"{record.sha256}  {record.path}\n" for record in artifacts.record_files(partial))
    artifacts.write_bytes(partial / SUMS, sums.encode())
    artifacts.promote(partial, out)
    return made


def upload(folder: Path, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Send an exported folder to the hub; returns the commit's address.

    The token is huggingface_hub's own (`HF_TOKEN`, or `hf auth login`).

    Raises:
        UploadFailed: the hub can't be reached, or refused.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export {folder.name}")
    except (OSError, ValueError, RuntimeError) as error:  # its own errors are OSErrors and ValueErrors
        raise UploadFailed(_why(repo, folder, error)) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "huggingface_hub"):
            raise
        raise UploadFailed(_why(repo, folder, error)) from error
    return str(done.commit_url)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile_argument(parser)
    parser.add_argument("model", help="a trained model: its folder or its stage, for example pretrain@self")
    parser.add_argument("--out", type=Path, help="folder to write (default: exported/NAME)")
    parser.add_argument(
        "--licence", help="as the hub names it, for example mit, or other:NAME; else that of what it is made from"
    )
    parser.add_argument("--upload", metavar="OWNER/NAME", help="also send it to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")


def main(args: argparse.Namespace) -> None:
    """Export, say what is there, and upload if asked to."""
    profile, key = find_output(args.model, args.config)
    out = args.out or Path("exported") / f"{STAGES[key].asset}-{profile.name}"
    export(args.model, out, config=args.config, licence=args.licence)
    files = [path for path in out.rglob("*") if path.is_file()]
    print(f"{out}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    if args.upload:
        print(upload(out, args.upload, private=args.private, endpoint=os.environ.get("HF_ENDPOINT")))


def _why(repo: str, folder: Path, error: Exception) -> str:
    said = " ".join((str(error) or type(error).__name__).split())
    return f"{repo}: the hub did not take {folder}: {said[:500]}. The folder is whole; try again with --upload {repo}"
