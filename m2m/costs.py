"""What each stage of a profile will take, before anything is launched: FLOPs, GPU-hours, bytes, memory, money.

Belongs here: how many passes a stage makes, and arithmetic with them. Not here: what a pass takes (`m2m.counted`,
which counts it on the meta device).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from m2m import counted
from m2m.config import Profile, resolve
from m2m.counted import Pass
from m2m.data.captions import SPLITS
from m2m.models.autoencoder import pixels_per_latent
from m2m.models.unet import ManyToManyUNet
from m2m.stages import STAGES, Stage, resources
from m2m.training.starting import feature_width, unet_config

DENSE_TFLOPS = {"A100": 312.0, "H100": 989.0}
"""Peak of 16-bit matrix products without sparsity, by NVIDIA's data sheets (SXM)."""

_ADAM_BYTES = 4 + 4 + 8 + 4  # a parameter's master copy, gradient, two moments and average, all float32


@dataclass(frozen=True)
class Cost:
    """What one stage takes; zeros where it needs no model."""

    flops: float = 0.0
    bytes: float = 0.0
    peak_bytes: float = 0.0
    note: str = ""

    def gpu_hours(self, kind: str, efficiency: float) -> float:
        return self.flops / (DENSE_TFLOPS[kind] * 1e12 * efficiency) / 3600


class Costs:
    """The costs of a profile's stages; a pass that several stages make is counted once."""

    def __init__(self, profile: Profile) -> None:
        self._profile, self._root = profile, profile.root
        self._passes: dict[Any, Pass] = {}
        self._found: dict[str, Cost] = {}

    def of(self, stage: Stage) -> Cost:
        """The stage's cost.

        Raises:
            ConfigError, InputError: settings that are wrong, or models that are not known here.
        """
        if stage.key not in self._found:
            self._found[stage.key] = self._of(stage)
        return self._found[stage.key]

    def _of(self, stage: Stage) -> Cost:
        _, config = stage.configured(self._profile)
        match stage.command:
            case "filter-captions":
                return Cost(bytes=_size(resolve(config.source, self._root)), note="CPU; about the source's size")  # type: ignore[attr-defined]
            case "generate-sets":
                return self._image_sets(config)
            case "cache-features":
                return self._features(config)
            case "pretrain" | "finetune":
                return self._training(stage, config)
            case "evaluate":
                return self._evaluation(stage, config)
        return Cost(note="CPU")

    def _image_sets(self, config: Any) -> Cost:
        dtype, source = _dtype(config), config.text_to_image
        unet = counted.text_to_image_unet(source, self._root, dtype)
        vae, text = counted.autoencoder(source, self._root, dtype), counted.text_encoder(source, self._root, dtype)
        side = _latent_side(config, unet, vae)
        sets, images, channels = _sets(config), config.images_per_set, unet.config["in_channels"]
        branches = 2 if config.guidance_scale > 1 else 1
        words = 77
        width = unet.config["cross_attention_dim"]
        rows = images * branches
        step = self._pass(
            ("unet", source, rows, side, dtype),
            lambda: unet(
                _meta(rows, channels, side, side, dtype=dtype), _meta(rows), _meta(rows, words, width, dtype=dtype)
            ),
        )
        prompts = self._pass(("text", source, branches, dtype), lambda: text(_meta(branches, words, dtype=torch.int64)))
        flops = sets * (config.steps * step.flops + prompts.flops)
        peak, note = step.peak_bytes, f"{sets * images:,} images, {config.steps} steps"
        if config.drawn:
            flops, peak, note = 0.0, 0, f"{sets * images:,} images, drawn"
        if config.store_images or config.content_filter:
            decode = self._decode(source, vae, side, min(config.decode_batch, images), dtype)
            flops += sets * images / min(config.decode_batch, images) * decode.flops
            peak, note = max(peak, decode.peak_bytes), f"{note}, decoded"
        size = sets * images * channels * side * side * 2
        if config.store_images:
            note += "; bytes of latents alone, pictures come on top"
        return Cost(flops, size, peak + counted.weight_bytes(unet, vae, text), note)

    def _features(self, config: Any) -> Cost:
        dtype = _dtype(config)
        sets, images = self._training_sets(config.sets), config.images_per_set - 1
        dino = counted.image_encoder(config.dino, self._root, dtype)
        batch = config.sets_per_batch * images
        encode = self._encode(config, dino, batch, dtype)
        flops, peak, weights = sets * images / batch * encode.flops, encode.peak_bytes, counted.weight_bytes(dino)
        made = self._stage_config("generate-sets")
        if not made.store_images and config.text_to_image:
            vae = counted.autoencoder(config.text_to_image, self._root, dtype)
            side = _latent_side(made, unet_config(made.text_to_image, self._root), vae)
            decode = self._decode(config.text_to_image, vae, side, config.decode_batch, dtype)
            flops += sets * images / config.decode_batch * decode.flops
            peak, weights = max(peak, decode.peak_bytes), weights + counted.weight_bytes(vae)
        tokens, width = _tokens(config, dino), dino.config.hidden_size
        each = tokens * width * 2 if config.storage == "fp16" else tokens * (width + 4)
        return Cost(flops, sets * images * each, peak + weights, f"{sets * images:,} images of {tokens} tokens")

    def _training(self, stage: Stage, config: Any) -> Cost:
        fine = stage.command == "finetune"
        source = self._stage_config("pretrain", "dino") if fine else config
        variant = "dino" if fine else str(stage.variant)
        dtype = torch.bfloat16 if config.compute.dtype == "bfloat16" else torch.float32
        unet = self._unet(
            source, variant, dtype, {"nvs": "camera", "vgsi": "position"}[str(stage.variant)] if fine else None
        )
        side, n, batch = unet.config["sample_size"], config.images_per_set, config.micro_batch
        tokens = self._tokens_of(source)

        def step() -> None:
            noisy = _meta(batch, n, unet.config["in_channels"], side, side, dtype=dtype)
            read = (
                {"clean": noisy}
                if variant == "self"
                else {"features": _meta(batch, n - 1, tokens, unet.feature_dim, dtype=dtype)}
            )
            unet.train()
            if config.gradient_checkpointing:
                unet.enable_gradient_checkpointing()
            with torch.enable_grad():
                times = torch.zeros(batch, n, dtype=torch.int64, device="meta")
                unet.training_forward(noisy, times, **read).sum().backward()

        found = self._pass(("train", stage.key), step)
        if config.steps is not None:
            seen = config.steps * config.sets_per_step
        elif fine:
            sets = self._task_sets(stage, config)
            if sets is None:
                return Cost(note=f"{config.data} is not there: without steps, its size decides")
            seen = config.epochs * sets
        else:
            seen = config.epochs * self._training_sets(config.sets)
        parameters = sum(p.numel() for p in unet.parameters())
        # gradients were alive in the pass already, in its own type
        peak = found.peak_bytes + parameters * _ADAM_BYTES
        size = parameters * 4 * (1 + 4 * config.keep_checkpoints)
        note = f"{seen:,} sets of {n}, {parameters / 1e6:,.0f} M parameters"
        flops = seen / batch * found.flops
        if variant == "dino" and (fine or source.features == "online"):
            dino = counted.image_encoder(source.dino, self._root, dtype)
            flops += seen * (n - 1) * self._encode(source, dino, 1, dtype).flops
            peak, note = peak + counted.weight_bytes(dino), f"{note}, features encoded while training"
        return Cost(flops, size, peak, note)

    def _evaluation(self, stage: Stage, config: Any) -> Cost:
        rollouts = _ROLLOUTS.get(str(stage.variant))
        if rollouts is None:
            return Cost(note="a measurement of time")
        flops, peak, images = 0.0, 0.0, 0
        dtype = _dtype(config)
        for key in (key for key in stage.inputs.values() if key.startswith(("pretrain", "finetune"))):
            variant = "self" if key == "pretrain@self" else "dino"
            if key.startswith("pretrain") and variant not in config.models:
                continue
            source = self._stage_config("pretrain", variant)
            unet = self._unet(source, variant, dtype)
            for each, preceding, count in rollouts(config):
                sets = each * config.noise_seeds
                images += sets * count
                one = self._rollout(source, unet, variant, preceding, count, config, dtype)
                flops, peak = flops + sets * one.flops, max(peak, one.peak_bytes + counted.weight_bytes(unet))
        return Cost(flops, 0, peak, f"{images:,} images, {config.sampling.num_inference_steps} steps; metrics left out")

    def _rollout(
        self,
        source: Any,
        unet: ManyToManyUNet,
        variant: str,
        preceding: int,
        count: int,
        config: Any,
        dtype: torch.dtype,
    ) -> Pass:
        """FLOPs of one set, memory of a batch of them. Both are linear in the images read: two are counted."""
        side, tokens, batch = unet.config["sample_size"], self._tokens_of(source), config.batch
        window, channels = config.sampling.context_window, unet.config["in_channels"]

        def images(sets: int, n: int) -> torch.Tensor:
            shape = (channels, side, side) if variant == "self" else (tokens, unet.feature_dim)
            return _meta(sets, n, *shape, dtype=dtype)

        def denoise(sets: int, n: int) -> Callable[[], Any]:
            context = unet.encode_context(images(sets, n))
            noisy = _meta(sets, channels, side, side, dtype=dtype)
            return lambda: unet.denoise_branches(noisy, torch.zeros((), device="meta"), [(None, None), (context, None)])

        with torch.no_grad():
            at = {n: self._pass(("denoise", variant, n, dtype), lambda n=n: denoise(1, n)()).flops for n in (1, 2)}
            encode = self._pass(("context", variant, dtype), lambda: unet.encode_context(images(1, 1))).flops
            most = max(1, min(preceding + count - 1, window or preceding + count))  # none read costs hardly less
            peak = self._pass(("memory", variant, most, batch, dtype), lambda: denoise(batch, most)()).peak_bytes
        flops = (preceding + count - 1) * encode
        for number in range(count):
            read = min(preceding + number, window or preceding + number)
            flops += config.sampling.num_inference_steps * (at[1] + (read - 1) * (at[2] - at[1]))
        vae = counted.autoencoder(source.text_to_image, self._root, dtype)
        flops += count * self._decode(source.text_to_image, vae, side, 1, dtype).flops
        return Pass(flops, peak)

    def _pass(self, key: Any, run: Callable[[], Any]) -> Pass:
        if key not in self._passes:
            with torch.set_grad_enabled(False):
                self._passes[key] = counted.count(run)
        return self._passes[key]

    def _decode(self, source: str, vae: Any, side: int, batch: int, dtype: torch.dtype) -> Pass:
        channels = vae.config["latent_channels"]
        return self._pass(
            ("decode", source, side, batch, dtype), lambda: vae.decode(_meta(batch, channels, side, side, dtype=dtype))
        )

    def _encode(self, config: Any, dino: Any, batch: int, dtype: torch.dtype) -> Pass:
        size = config.feature_size or dino.config.image_size
        pixels = _meta(batch, 3, size, size, dtype=dtype)
        return self._pass(
            ("dino", config.dino, batch, size, dtype), lambda: dino(pixel_values=pixels, interpolate_pos_encoding=True)
        )

    def _unet(self, source: Any, variant: str, dtype: torch.dtype, condition: str | None = None) -> ManyToManyUNet:
        width = feature_width(source.dino, self._root) if variant == "dino" else None
        with torch.device("meta"):
            unet = ManyToManyUNet.from_text_to_image(
                unet_config(source.text_to_image, self._root),
                variant,  # type: ignore[arg-type]
                width,
                condition,
                **source.own_unet_settings(),
            )
        torch.nn.Module.to(unet, dtype)
        return unet.eval()

    def _tokens_of(self, source: Any) -> int:
        return _tokens(source, counted.image_encoder(source.dino, self._root, torch.float32))

    def _training_sets(self, limit: int | None) -> int:
        """Captions of the training split, of those that the shards take."""
        made, filtered = self._stage_config("generate-sets"), self._stage_config("filter-captions")
        total = _sets(made)
        train = round(total * (1 - filtered.validation_fraction - filtered.test_fraction))
        most = (made.per_split or {}).get("train", train)
        return min(train, most, limit or train)

    def _task_sets(self, stage: Stage, config: Any) -> int | None:
        from m2m.errors import InputError
        from m2m.training.finetune import open_task

        try:
            return len(open_task(config, str(stage.variant), resolve(config.data, self._root), 64, "train"))
        except InputError:
            return None

    def _stage_config(self, command: str, variant: str | None = None) -> Any:
        stage = STAGES[f"{command}@{variant}" if variant else command]
        return stage.configured(self._profile)[1]

    @cached_property
    def gpus(self) -> int:
        """GPUs of the largest launch of the profile: what sharded stages are spread over unless told otherwise."""
        asked = [resources(stage, self._profile) for stage in STAGES.values()]
        return max(one.nodes * one.gpus for one in asked)


# (sets, preceding images, generated images) of each evaluation, one model
_ROLLOUTS: dict[str, Callable[[Any], list[tuple[int, int, int]]]] = {
    "table_1": lambda c: [(c.sets, c.preceding, c.num_images)],
    "preceding_images": lambda c: [(c.trials * (1 + len(c.guidances) + c.sketches), n, 1) for n in c.preceding],
    "consistency": lambda c: [(c.sets, c.preceding, c.num_images)],
    "real_images": lambda c: [(c.categories * c.sets_per_category, c.preceding, c.num_images)],
    "novel_views": lambda c: [(c.objects * c.targets, n, 1) for n in c.preceding],
    "procedures": lambda c: [(c.procedures, c.preceding, c.num_images)],
    "rollouts": lambda c: [(c.sets * (1 + len(c.remedies)), c.preceding, c.num_images)],
}


def cost_lines(stage: Stage, costs: Costs, *, efficiency: float, gpus: int | None, price: float | None) -> list[str]:
    """A stage's cost for people."""
    cost, asked = costs.of(stage), resources(stage, costs._profile)
    if not cost.flops:
        return [f"  cost: {cost.note}" + (f", {_bytes(cost.bytes)} written" if cost.bytes else "")]
    hours = {kind: cost.gpu_hours(kind, efficiency) for kind in DENSE_TFLOPS}
    own = hours[_kind(asked)]
    money = "" if price is None else f"; {own * price:,.2f} at {price:g} a {_kind(asked)}-hour"
    lines = [
        f"  cost: {cost.flops:.3g} FLOP ({cost.note}); {_bytes(cost.bytes)} written; "
        f"peak {_bytes(cost.peak_bytes)} a GPU",
        f"  at {efficiency:.0%} of peak: {', '.join(f'{n:,.4g} {kind}-hours' for kind, n in hours.items())}{money}",
    ]
    spread = (gpus or costs.gpus) if stage.partitioned else asked.nodes * asked.gpus
    if spread:
        lines.append(f"  wall time on {spread} x {_kind(asked)}: {own / spread:,.4g} h")
    return lines


def _kind(asked: Any) -> str:
    return next((kind for kind in DENSE_TFLOPS if kind.lower() in (asked.gpu_type or "").lower()), "A100")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError


def _dtype(config: Any) -> torch.dtype:
    return getattr(torch, config.compute.dtype)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sets(config: Any) -> int:
    """Sets that generate-sets makes, if there are captions enough."""
    limits = config.per_split or {}
    most = sum(limits.values()) if len(limits) == len(SPLITS) else config.shards * config.sets_per_shard
    return min(most, config.shards * config.sets_per_shard)


def _latent_side(config: Any, unet: Any, vae: Any) -> int:
    sample = unet["sample_size"] if isinstance(unet, dict) else unet.config["sample_size"]
    return config.image_size // pixels_per_latent(vae) if config.image_size else sample


def _tokens(config: Any, dino: Any) -> int:
    return 1 + ((config.feature_size or dino.config.image_size) // dino.config.patch_size) ** 2


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
