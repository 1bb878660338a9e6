"""`python -m m2m.tiny`: write the default inputs, train the small models, ship them, measure them, show results.

Belongs here: the command line. Not here: what the commands do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from m2m.arguments import EXIT_BAD_INPUT
from m2m.errors import ConfigError, M2MError
from m2m.tiny import DATA, WEIGHTS

MODELS = ("classifier", "autoencoder", "clip", "dino", "text-to-image")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except M2MError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m m2m.tiny", description=__doc__)
    commands = parser.add_subparsers(required=True)

    world = commands.add_parser("world", help="write captions, objects, procedures and photo sets")
    world.add_argument("--out", type=Path, default=DATA)
    world.add_argument("--captions", type=int, default=400)
    world.add_argument("--objects", type=int, default=24, help="twelve views each")
    world.add_argument("--articles", type=int, default=60)
    world.add_argument("--photos", type=int, default=8, help="in each of six categories")
    world.add_argument("--seed", type=int, default=0)
    world.set_defaults(run=_world)

    train = commands.add_parser("train", help="train one model; checkpoints in outputs/tiny-models/NAME")
    train.add_argument("name", choices=MODELS, help="text-to-image needs a trained autoencoder and clip")
    train.add_argument("--steps", type=int, help="default: what the shipped weights were trained for")
    train.add_argument("--out", type=Path, default=WEIGHTS, help="where the trained model is shipped to")
    train.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    train.add_argument("--threads", type=int, help="default: torch's own choice")
    train.add_argument("--init-from", type=Path, metavar="FOLDER", help="text-to-image: of a U-Net to start from")
    train.set_defaults(run=_train)

    m2m = commands.add_parser(
        "m2m", help="train M2M's starting weights on drawn sets, from the shipped text-to-image ones"
    )
    m2m.add_argument("variant", choices=("self", "dino"))
    m2m.add_argument("--steps", type=int, default=2000)
    m2m.add_argument("--sets", type=int, default=12_000)
    m2m.add_argument("--seed", type=int, default=0)
    m2m.add_argument("--out", type=Path, default=WEIGHTS)
    m2m.add_argument("--threads", type=int, default=2)
    m2m.add_argument("--name", default="", help="of a training with other settings: shipped to m2m-self-NAME")
    m2m.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        default=(),
        metavar="KEY=VALUE",
        help="settings of pretrain: timesteps=set, context_noise=200, ...",
    )
    m2m.set_defaults(run=_m2m)

    export = commands.add_parser("export", help="ship the newest checkpoints, also of unfinished trainings")
    export.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"default: {', '.join(MODELS)}. Also m2m-self, m2m-dino-1 (of seed 1), or a folder that finetune made",
    )
    export.add_argument("--out", type=Path, default=WEIGHTS)
    export.set_defaults(run=_export)

    measure = commands.add_parser("measure", help="measure the shipped models and write measured.json beside them")
    measure.add_argument("--weights", type=Path, default=WEIGHTS)
    measure.add_argument("--pictures", type=int, default=2000, help="held-out pictures")
    measure.add_argument("--samples", type=int, default=500, help="text-to-image samples")
    measure.add_argument("--grid", type=Path, help="also write a PNG of samples here")
    measure.set_defaults(run=_measure)
    seen = commands.add_parser("seen", help="how much of an image models see through noise, after four images and none")
    seen.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="outputs/tiny_claims/pretrain/self")
    seen.add_argument("--sets", type=int, default=200)
    seen.set_defaults(run=_seen)
    results = commands.add_parser("results", help="fill the marked places of the page of results from outputs")
    results.add_argument(
        "outputs",
        type=Path,
        nargs="*",
        help="outputs/tiny_claims, one folder for each seed; what is kept beside the page need not be named",
    )
    results.add_argument("--page", type=Path, default=Path("docs/results/README.md"))
    results.add_argument("--weights", type=Path, default=WEIGHTS)
    results.set_defaults(run=_results)
    return parser


# The models are imported where they are used: writing the inputs needs no torch.


def _world(arguments: argparse.Namespace) -> None:
    from m2m.tiny.inputs import write_inputs

    counts = {name: getattr(arguments, name) for name in ("captions", "objects", "articles", "photos")}
    write_inputs(arguments.out, **counts, seed=arguments.seed)


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from m2m.tiny import autoencoder, classifier, clip, dino, text_to_image
    from m2m.tiny.export import export

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    trainings = {
        "classifier": classifier.train_classifier,
        "autoencoder": autoencoder.train_autoencoder,
        "clip": clip.train_clip,
        "dino": dino.train_dino,
        "text-to-image": text_to_image.train_text_to_image,
    }
    given = {name: getattr(arguments, name) for name in ("steps", "init_from")}
    if arguments.init_from and arguments.name != "text-to-image":
        raise ConfigError(f"--init-from: {arguments.name} is trained from random weights; text-to-image alone takes it")
    trainings[arguments.name](resume=arguments.resume, **{name: one for name, one in given.items() if one is not None})
    export(arguments.name, arguments.out)


def _m2m(arguments: argparse.Namespace) -> None:
    from m2m.tiny.many_to_many import train_many_to_many

    names = ("steps", "sets", "threads", "seed", "name", "overrides")
    given = {name: getattr(arguments, name) for name in names}
    print(train_many_to_many(arguments.variant, arguments.out, **given))


def _export(arguments: argparse.Namespace) -> None:
    from m2m.tiny.export import export

    for name in arguments.names or MODELS:
        export(name, arguments.out)


def _measure(arguments: argparse.Namespace) -> None:
    from m2m.tiny.measure import measure

    measure(arguments.weights, arguments.pictures, arguments.samples, arguments.grid)


def _seen(arguments: argparse.Namespace) -> None:
    from m2m.tiny.seen_through_noise import TIMESTEPS, seen_through_noise

    width = max(len(str(folder)) for folder in arguments.folders) + len(", after 4")
    print(f"{'squared error over variance, at timestep':>{width}} {' '.join(f'{one:>6}' for one in TIMESTEPS)}")
    for folder in arguments.folders:
        for told, errors in seen_through_noise(folder, arguments.sets).items():
            print(f"{f'{folder}, {told}':>{width}} {' '.join(f'{one:6.3f}' for one in errors)}", flush=True)


def _results(arguments: argparse.Namespace) -> None:
    from m2m.tiny.results import rebuild

    for place in rebuild(arguments.page, arguments.outputs, arguments.weights):
        print(f"not in the outputs: {place}")


if __name__ == "__main__":
    raise SystemExit(main())
