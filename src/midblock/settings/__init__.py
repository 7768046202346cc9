"""What every command can be told: one pydantic model per command is the only declaration of a setting.

From a model come the command line's options and help, the validation (all faults at once, in the words of
whoever called), the keys of a sweep's YAML, `run.json` and the docs. Nothing here imports torch.
"""

from midblock.settings.base import Settings, name_of, setting
from midblock.settings.load import ChainLoadSettings, LoadSettings
from midblock.settings.profile import ProfileSettings, StabilitySettings

__all__ = ["ChainLoadSettings", "LoadSettings", "ProfileSettings", "Settings", "StabilitySettings", "name_of",
           "setting"]
