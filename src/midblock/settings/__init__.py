"""What every command can be told: one pydantic model per command is the only declaration of a setting.

From a model come the command line's options and help, the validation (all faults at once, in the words of
whoever called), the keys of a sweep's YAML, `run.json` and the docs. Nothing here imports torch.
"""

from midblock.settings.base import Settings, name_of, setting
from midblock.settings.correlate import CorrelateSettings
from midblock.settings.evaluate import EvaluateSettings, ScoringSettings
from midblock.settings.gradients import GradientSettings
from midblock.settings.importance import ImportanceSettings
from midblock.settings.lens import LensSettings
from midblock.settings.load import ChainLoadSettings, LoadSettings, StreamedChainSettings, StreamedLoadSettings
from midblock.settings.locate import LocateSettings, ScoreSettings
from midblock.settings.merge import MergeSettings
from midblock.settings.overlap import OverlapSettings
from midblock.settings.profile import ProfileSettings, StabilitySettings
from midblock.settings.steer import SteerSettings
from midblock.settings.swap import SwapSettings
from midblock.settings.tune import PlanSettings, RowSettings, TrainSettings, TuneSettings, WhereSettings
from midblock.settings.weights import WeightsSettings

__all__ = ["ChainLoadSettings", "CorrelateSettings", "EvaluateSettings", "GradientSettings", "ImportanceSettings",
           "LensSettings", "LoadSettings", "LocateSettings", "MergeSettings", "OverlapSettings", "PlanSettings",
           "ProfileSettings", "RowSettings", "ScoreSettings", "ScoringSettings", "Settings", "StabilitySettings",
           "SteerSettings", "StreamedChainSettings", "StreamedLoadSettings", "SwapSettings", "TrainSettings",
           "TuneSettings", "WeightsSettings", "WhereSettings",
           "name_of", "setting"]
