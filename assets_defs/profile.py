"""The profile that the definitions are loaded for.

Belongs here: reading it once, from `M2M_PROFILE` (tiny by default). Not here: anything decided from it.
"""

from m2m.config import Profile, load_profile
from m2m.stages import commands

PROFILE: Profile = load_profile(known=commands())
