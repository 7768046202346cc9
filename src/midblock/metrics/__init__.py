"""Every measure of the analysis as a pure function of tensors (no I/O, no models).

`spectrum`, `entropy`, `rank`: of the spectrum of a set of states. `geometry`: sparsity, curvature, norms, Gini,
intrinsic dimension. `cka`, `likeness`, `change`: of the states of two models. `rotation`: of two
weights. `views`: InfoNCE, LiDAR, DiME of augmented views.
`logits`: loss, entropy, rank and agreement of next-token distributions. `layers`: block influence, change points and
weight spectra for locating. What a measure is called, its unit and its formula are in `midblock.quantities`.
"""

import importlib
import pkgutil

from midblock.metrics.change import *  # noqa: F403
from midblock.metrics.cka import *  # noqa: F403
from midblock.metrics.entropy import *  # noqa: F403
from midblock.metrics.geometry import *  # noqa: F403
from midblock.metrics.layers import *  # noqa: F403
from midblock.metrics.likeness import *  # noqa: F403
from midblock.metrics.logits import *  # noqa: F403
from midblock.metrics.rank import *  # noqa: F403
from midblock.metrics.rotation import *  # noqa: F403
from midblock.metrics.spectrum import *  # noqa: F403
from midblock.metrics.views import *  # noqa: F403

# a module of its own for a new metric registers its record when it is imported, and needs no line here
for _module in pkgutil.iter_modules(__path__):  # noqa: F405
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
