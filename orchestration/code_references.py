"""Where the code of an asset stands: a link on its page in the UI.

Belongs here: links to local files, or to the repository of `M2M_GIT_URL`. Not here: which file does a stage's work
(`assets_defs.launching`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from m2m.errors import ConfigError


def with_code_references(assets: Sequence[Any]) -> Sequence[Any]:
    """The assets with a link to their definition; to GitHub or GitLab where `M2M_GIT_URL` says which.

    Raises:
        ConfigError: `M2M_GIT_URL` is neither.
    """
    linked = dg.with_source_code_references(assets)
    url = os.environ.get("M2M_GIT_URL")
    if not url:
        return linked
    root = Path(__file__).parents[1]
    try:
        return dg.link_code_references_to_git(
            linked,
            git_url=url,
            git_branch=os.environ.get("M2M_GIT_BRANCH", "main"),
            file_path_mapping=dg.AnchorBasedFilePathMapping(root, ""),
        )
    except ValueError as error:
        raise ConfigError(f"M2M_GIT_URL is {url}: {error}. It must be a GitHub or GitLab address") from None
