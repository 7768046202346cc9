"""Every quantity of the analysis as a pure function of tensors (no I/O, no models).

`spectral`: entropies, ranks and scale of a spectrum. `geometry`: sparsity, curvature, norms,
Gini, intrinsic dimension. `alignment`: CKA, cosine, mean shift, change intensity. `views`:
InfoNCE, LiDAR, DiME of augmented views. `logits`: loss, entropy, rank and agreement of
next-token distributions. `layers`: block influence, change points and weight spectra for locating.
"""

from midblock.metrics.alignment import *  # noqa: F403
from midblock.metrics.geometry import *  # noqa: F403
from midblock.metrics.layers import *  # noqa: F403
from midblock.metrics.logits import *  # noqa: F403
from midblock.metrics.spectral import *  # noqa: F403
from midblock.metrics.views import *  # noqa: F403
