r"""Every measure as one record: what it is called, what it means, what computes it.

`profile` measures what is registered here at its level, `figures` takes labels and units from here, `correlate` and
the tests against no change take the value of "no change", the documentation its formulas. Nothing here imports torch,
so that a table can be drawn and a help page printed without it.

A measure of your own is one file (or a cell of a notebook): a function and its record.

    from midblock.quantities import Quantity, register

    def participation_ratio(x):
        "(sum of eigenvalues)^2 / sum of their squares, of the rows' Gram matrix (N, N)."
        gram = x @ x.mT
        return gram.trace() ** 2 / gram.square().sum()

    register(Quantity("participation_ratio", "Participation ratio", level="dataset", unit="dimensions",
                      family="information", formula=r"(\sum_k \lambda_k)^2 / \sum_k \lambda_k^2",
                      function=participation_ratio))

`midblock.profile` then measures and draws it at every hidden state; see docs/adding-a-metric.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from midblock.errors import SettingsError

__all__ = ["FAMILIES", "MATRICES", "Level", "Quantity", "find", "known", "label_of", "matrix_order", "moved",
           "quantities", "register", "unchanged"]

Level = Literal["token", "dataset", "views", "weight", "logits", "gradient", "block"]
"""What a measure is taken of: the token states of one sample (T, d); one pooled row per sample (N, d); augmented
views (V, N, d); a weight matrix; the next-token distributions; a gradient; input and output of a block."""

FAMILIES: dict[str, str] = {
    "information": "Information and rank",
    "spectrum": "Scale of the spectrum",
    "geometry": "Geometry of the states",
    "alignment": "Likeness of two models",
    "change": "Size of the change",
    "views": "Robustness to augmentation",
    "weights": "Change of the weights",
    "predictions": "Predictions",
    "agreement": "Agreement of predictions",
    "gradients": "Gradients",
    "importance": "Importance of blocks",
}
"""Figures and pages of the documentation: one per family, in this order."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    r"""One measure.

    Args:
        name: As in the column ``metric`` of tables: lower case, words joined by underscores.
        label: In figures and on pages, without unit.
        level: What it is taken of, see `Level`.
        family: Figure that it is drawn in, a key of `FAMILIES`.
        unit: Unit of the axis; empty where there is none.
        paired: It compares two models directly; otherwise each model has a value, and the difference is reported.
        unchanged: Value of a paired measure of a model with itself.
        formula: TeX, without dollar signs.
        source: Paper and equation, where it is not a plain definition.
        function: The function, or ``module:name`` of it. What it is called with depends on ``level``:
            token: states (B, T, d) and ``mask=`` (B, T), one value a sample back;
            dataset: rows (N, d), a value or one a row back;
            paired: the same of two models, the earlier one first.
            views: (N, V, d), a value back.
        options: Keyword arguments of the function -> fields of the command's settings.
        fixed: Keyword arguments that are always the same.
        spectrum: ``function`` takes a `metrics.Spectrum` instead of X: one decomposition then serves all such measures
            and their bootstrap.
        unit_rows: Of a spectrum: rows are scaled to norm 1 first where the settings' ``unit_rows`` asks for it.
        interval: Of a spectrum: the bootstrap's, by a jackknife over ten groups of samples where that is too short, or
            none where neither holds the value (simulated in docs/statistics.md).
        resampled: ``(x, [y,] weights (B, N)) -> (B)``: its bootstrap replicates. Without it (and without
            ``jackknife``) a value for the whole data set gets a jackknife over ten groups of samples.
        jackknife: ``(x, [y]) -> (N)``: its values without each sample in turn.
        least: Samples needed.
        variants: In words, one per variant.
        reading: How to read it, one or two sentences.
    """

    name: str
    label: str
    level: Level
    family: str
    unit: str = ""
    paired: bool = False
    unchanged: float = 0.0
    formula: str = ""
    source: str = "definition"
    function: str | Callable[..., Any] = ""
    options: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    spectrum: bool = False
    unit_rows: bool = False
    interval: Literal["bootstrap", "groups", "none"] = "bootstrap"
    resampled: str | Callable[..., Any] = ""
    jackknife: str | Callable[..., Any] = ""
    least: int = 2
    variants: Sequence[str] = ()
    reading: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name != self.name.lower():
            raise SettingsError(f"quantity {self.name!r}: a name is lower-case words joined by underscores.")
        if self.level not in get_args(Level) or self.family not in FAMILIES:
            raise SettingsError(f"quantity {self.name!r}: level {self.level!r} or family {self.family!r} is unknown; "
                                f"levels are {', '.join(get_args(Level))}, families {', '.join(FAMILIES)}.")

    @property
    def axis(self) -> str:
        """Label with its unit.

        Example:
            >>> find("curvature").axis
            'Curvature (mean angle / π)'
        """
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def load(self, part: Literal["function", "resampled", "jackknife"] = "function") -> Callable[..., Any]:
        """The function itself, imported where it is named.

        Raises:
            SettingsError: the record has none.
        """
        found = getattr(self, part)
        if not found:
            raise SettingsError(f"quantity {self.name!r} has no {part}.")
        if callable(found):
            return found  # type: ignore[no-any-return]
        module, _, name = found.partition(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]

    def arguments(self, settings: Any) -> dict[str, Any]:
        """Its keyword arguments, from a command's settings."""
        return {**self.fixed, **{keyword: getattr(settings, name) for keyword, name in self.options.items()}}


_KNOWN: dict[str, Quantity] = {}


def register(quantity: Quantity, *, replace: bool = False) -> Quantity:
    """Make a quantity known to profile, figures, correlate and the documentation; returns it.

    Raises:
        SettingsError: the name is taken, and ``replace`` is not given.
    """
    if quantity.name in _KNOWN and not replace:
        raise SettingsError(f"a quantity {quantity.name!r} is known already; choose another name, or replace=True.")
    _KNOWN[quantity.name] = quantity
    return quantity


def known(name: str) -> bool:
    """Whether a quantity of this name is registered."""
    return name in _KNOWN


def find(name: str) -> Quantity:
    """The quantity of this name.

    Raises:
        SettingsError: there is none.
    """
    if name not in _KNOWN:
        raise SettingsError(f"no quantity {name!r}; there are: {', '.join(_KNOWN)}.")
    return _KNOWN[name]


def quantities(*, level: Level | None = None, family: str | None = None, paired: bool | None = None) -> list[Quantity]:
    """All quantities, or those of a level, a family, or that compare two models, in the order of their families.

    Example:
        >>> [q.name for q in quantities(family="spectrum")]
        ['spectral_norm', 'condition_number']
    """
    chosen = [q for q in _KNOWN.values() if (level is None or q.level == level)
              and (family is None or q.family == family) and (paired is None or q.paired == paired)]
    order = list(FAMILIES)
    return sorted(chosen, key=lambda q: order.index(q.family))


def unchanged(name: str, side: str = "pair") -> float:
    """Value that says "no change": 0 for a difference, the record's own for a pair score.

    Example:
        >>> unchanged("cka"), unchanged("effective_rank", "difference"), unchanged("mean_shift")
        (1.0, 0.0, 0.0)
    """
    return _KNOWN[name].unchanged if side == "pair" and name in _KNOWN else 0.0


def moved(name: str, side: str, value: float, *, size: float = 0.0, width: int = 1,
          samples: int = 1) -> float:
    """Distance of a value from "no change"; 0 where rounding alone can take it that far.

    That is size * eps * sqrt(terms), the probabilistic bound of a sum's rounding error (Higham & Mary, SIAM J. Sci.
    Comput. 41, 2019, theorem 2.4, lambda = 2). Token-level measures are float32 sums over the hidden size, the others
    float64 sums over samples and hidden size.

    Args:
        name: A measure.
        side: ``pair`` or ``difference``.
        value: Its value.
        size: Of the two values that a difference is of; a similarity's is 1.
        width: Hidden size.
        samples: That were pooled.

    Example:
        >>> moved("cka", "pair", 0.75), moved("cka", "pair", 1 - 1e-15, width=500), moved("mean_shift", "pair", 1e-12)
        (0.25, 0.0, 1e-12)
    """
    same = unchanged(name, side)
    tokens = name in _KNOWN and _KNOWN[name].level == "token"
    eps, terms = (2.0**-23, width) if tokens else (2.0**-52, width * samples)
    distance = abs(value - same)
    return 0.0 if distance <= max(size, same) * eps * terms**0.5 else distance


def label_of(name: str, *, unit: str | None = None, change: bool = False) -> str:
    """Axis label of a metric with its unit, also of one that has no record.

    Args:
        name: As in a table's column ``metric``.
        unit: Instead of the record's.
        change: Of the change of the metric.

    Example:
        >>> label_of("loss"), label_of("my_metric"), label_of("l2_norm", unit="a.u.")
        ('Loss (nats per token)', 'My metric', 'L2 norm (a.u.)')
        >>> label_of("loss", change=True)
        'Loss, change (nats per token)'
    """
    if name in _KNOWN:
        words, unit = _KNOWN[name].label, _KNOWN[name].unit if unit is None else unit
    else:
        words = name[:1].upper() + name[1:].replace("_", " ")
    words += ", change" if change and "change" not in words.lower() else ""
    return f"{words} ({unit})" if unit else words


MATRICES: tuple[str, ...] = (
    "qkvo", "mlp", "all", "q", "k", "v", "kv", "qkv", "o", "cross", "cross_q", "cross_k", "cross_v", "cross_kv",
    "cross_qkv", "cross_o", "gate", "up", "gate_up", "down", "router", "norm", "bias", "adapter", "other", "embeddings",
    "final_norm", "head")
"""The order of matrices (and groups of them) in every table and figure: as data pass through a block."""


def matrix_order(names: Sequence[str]) -> list[str]:
    """Names in the order of `MATRICES`, each once; others keep their order behind them.

    Example:
        >>> matrix_order(["down", "q", "mine", "o", "q"])
        ['q', 'o', 'down', 'mine']
    """
    place = {name: i for i, name in enumerate(MATRICES)}
    return sorted(dict.fromkeys(names), key=lambda name: place.get(name, len(place)))


# -- the records -----------------------------------------------------------------------------------

_METRICS = "midblock.metrics:"


def _add(name: str, label: str, level: Level, family: str, **rest: Any) -> None:
    for part in ("function", "resampled", "jackknife"):
        if rest.get(part):
            rest[part] = _METRICS + rest[part]
    register(Quantity(name=name, label=label, level=level, family=family, **rest))


_ENTROPY_VARIANTS = ("order a other than 1: ln(sum p^a) / (1 - a)",
                     "divided by ln min(n, d) (max; the paper's code), ln n (rows; the paper's text), ln d (dim), or "
                     "not (none)",
                     "rows scaled to norm 1 first (the paper's code)")

# information and rank
_add("prompt_entropy", "Prompt entropy", "token", "information", unit="share of the maximum",
     function="prompt_entropy", options={"alpha": "alpha", "normalize": "normalize", "unit_rows": "unit_rows"},
     formula=r"\frac{-\sum_k p_k \ln p_k}{\ln \min(T, d)},\quad p = \operatorname{eig} "
             r"\frac{ZZ^\top}{\operatorname{tr} ZZ^\top}", source="Paper, eq. 2; Giraldo et al. 2015",
     variants=_ENTROPY_VARIANTS,
     reading="How evenly the tokens of a text spread over directions (1: all alike). Lower: states are compressed.")
_add("dataset_entropy", "Dataset entropy", "dataset", "information", unit="share of the maximum",
     function="entropy_of", spectrum=True, unit_rows=True, interval="groups",
     options={"alpha": "alpha", "normalize": "normalize"},
     formula=r"\frac{-\sum_k p_k \ln p_k}{\ln \min(N, d)},\quad p = \operatorname{eig} "
             r"\frac{XX^\top}{\operatorname{tr} XX^\top}", source="Paper, eq. 3", variants=_ENTROPY_VARIANTS,
     reading="How evenly the samples spread over directions. Lower after tuning: the samples move together.")
_add("effective_rank", "Effective rank", "dataset", "information", unit="dimensions",
     function="effective_rank_of", spectrum=True, interval="groups", options={"energy": "energy"},
     formula=r"\exp\left(-\sum_k q_k \ln q_k\right),\quad q_k = s_k / \textstyle\sum_j s_j",
     source="Paper, eq. 4; Roy and Vetterli 2007",
     variants=("squared singular values in place of s (the paper's code)",),
     reading="The number of directions that the samples use. It grows with the number of samples: compare at "
             "equal N.")
_add("effective_rank_normalized", "Effective rank, normalised", "dataset", "information", unit="share of min(N, d)",
     function="effective_rank_of", fixed={"normalize": True}, spectrum=True, interval="groups",
     options={"energy": "energy"}, formula=r"\exp\left(-\sum_k q_k \ln q_k\right) / \min(N, d)", source="Paper, eq. 4",
     reading="The effective rank as a share of the largest possible.")
_add("rank_deficiency", "Rank deficiency", "dataset", "information", unit="share of min(N, d)",
     function="rank_deficiency_of", spectrum=True, options={"tol": "rank_tol"},
     formula=r"1 - \frac{\#\{k : s_k > 0.01\, s_1\}}{\min(N, d)}", source="Paper, section 3.3",
     variants=("another tolerance in place of 0.01",), reading="Share of directions with next to nothing in them.")
_add("sparsity", "Sparsity", "token", "information", unit="share of entries", function="sparsity",
     options={"eps": "sparsity_eps", "relative": "sparsity_relative"},
     formula=r"\frac{\#\{(t, j) : |z_{tj}| < \varepsilon\}}{T d}", source="Paper, section 3.3",
     variants=("epsilon relative to the largest entry of the sample (the paper's code)",),
     reading="Share of entries that are next to zero.")

# scale of the spectrum
_add("spectral_norm", "Spectral norm", "dataset", "spectrum", unit="units of the states", function="spectral_norm_of",
     spectrum=True, formula="s_1", source="Paper, figure 2",
     reading="Length of the longest direction of the pooled states.")
_add("condition_number", "Condition number", "dataset", "spectrum", function="condition_number_of",
     spectrum=True, interval="none", formula=r"s_1 / s_{\min}", source="Paper, figure 2",
     reading="How much longer the longest direction is than the shortest; undefined for linearly dependent samples. No "
             "interval: the shortest is that of the two samples most alike, which resampling cannot show.")

# geometry of the states
_add("curvature", "Curvature", "token", "geometry", unit="mean angle / π", function="curvature",
     formula=r"\frac{1}{\pi (T - 2)} \sum_t \angle(v_t, v_{t+1}),\quad v_t = z_{t+1} - z_t", source="Paper, eq. 5",
     reading="How sharply the path of token states turns: 0 is a straight line, 1 a reversal at every token.")
_add("l2_norm", "L2 norm", "dataset", "geometry", unit="units of the states", function="row_norms",
     formula=r"\frac1N \sum_i \lVert x_i \rVert_2", source="Paper's code", reading="Length of the pooled states.")
_add("gini", "Gini coefficient", "dataset", "geometry", function="gini_rows",
     formula=r"\frac{\sum_j (2j - d - 1)\, |x|_{(j)}}{d \sum_j |x|_{(j)}}", source="Gini 1912; Hurley and Rickard 2009",
     reading="How unequal the sizes of a state's entries are: 0 all alike, near 1 a few hold everything.")
_add("intrinsic_dimension", "Intrinsic dimension", "dataset", "geometry", unit="dimensions",
     function="intrinsic_dimension", resampled="intrinsic_dimension_bootstrap", least=3,
     formula=r"N \Big/ \sum_i \ln \frac{r_{i2}}{r_{i1}}", source="TwoNN: Facco et al. 2017; Denti et al. 2022",
     reading="Dimension of the surface on which the samples lie, from the distances to the two nearest "
             "neighbours.")

# likeness of two models
_add("cka", "CKA", "dataset", "alignment", unit="1 = same shape", paired=True, unchanged=1.0, function="cka",
     resampled="cka_bootstrap", formula=r"\frac{\langle HKH, HLH \rangle}{\lVert HKH \rVert_F \lVert HLH \rVert_F}",
     source="Paper, eq. 6; Kornblith et al. 2019",
     reading="Likeness of the two models' geometry, whatever the rotation and scale. Biased towards 1 where "
             "there are fewer samples than dimensions: read the debiased one beside it.")
_add("cka_debiased", "CKA, debiased", "dataset", "alignment", unit="1 = same shape", paired=True, unchanged=1.0,
     function="cka_debiased", jackknife="cka_debiased_jackknife", least=5,
     formula=r"\frac{\mathrm{HSIC}_1(K, L)}{\sqrt{\mathrm{HSIC}_1(K, K)\, \mathrm{HSIC}_1(L, L)}}",
     source="Song et al. 2012, eq. 5; Nguyen et al. 2021",
     reading="CKA without the bias of few samples: near 0 for unrelated states, whatever the width.")
_add("cosine", "Cosine similarity", "dataset", "alignment", unit="1 = same direction", paired=True, unchanged=1.0,
     function="cosine_similarity",
     formula=r"\frac1N \sum_i \frac{\langle x_i, y_i \rangle}{\lVert x_i \rVert \lVert y_i \rVert}",
     source="Paper, eq. 7", reading="Whether a sample's pooled state still points the same way.")
_add("token_cosine", "Cosine similarity of tokens", "token", "alignment", unit="1 = same direction", paired=True,
     unchanged=1.0, function="token_cosine", formula=r"\frac1T \sum_t \cos(z_t, z'_t)",
     source="Paper, eq. 7, token by token", reading="Whether each token's state still points the same way.")
_add("procrustes", "Procrustes angle", "dataset", "alignment", unit="radians", paired=True, function="procrustes_angle",
     formula=r"\arccos \frac{\lVert X^\top Y \rVert_*}{\lVert X \rVert_F \lVert Y \rVert_F}",
     source="Williams et al. 2021", reading="Angle between the two clouds after the best rotation: 0 for the same "
                                             "shape. A distance, where CKA is a similarity.")
_add("mutual_neighbours", "Common nearest neighbours", "dataset", "alignment", unit="share of 10", paired=True,
     unchanged=1.0, function="mutual_neighbours", least=3,
     formula=r"\frac{1}{N k} \sum_i |\mathrm{kNN}_x(i) \cap \mathrm{kNN}_y(i)|", source="Huh et al. 2024",
     variants=("with fewer than 40 samples, a quarter of them in place of 10",),
     reading="Whether a sample still has the same neighbours. Unrelated states share about k / (N - 1).")
_add("rsa", "RSA", "dataset", "alignment", unit="Spearman correlation", paired=True, unchanged=1.0, function="rsa",
     least=4, formula=r"\rho_{\mathrm{S}}\big(1 - \operatorname{corr}(x_i, x_j),\ "
                      r"1 - \operatorname{corr}(y_i, y_j)\big)", source="Kriegeskorte et al. 2008",
     reading="Whether samples that were unlike each other still are, in order.")

# size of the change
_add("mean_shift", "Mean shift", "dataset", "change", unit="units of the states", paired=True, function="mean_shift",
     resampled="mean_shift_bootstrap", formula=r"\lVert \bar y - \bar x \rVert_2", source="Paper, eq. 7",
     reading="How far the centre of all samples moved.")
_add("mean_shift_relative", "Mean shift, relative", "dataset", "change", unit="share of the base's mean norm",
     paired=True, function="mean_shift", resampled="mean_shift_bootstrap", fixed={"relative": True},
     formula=r"\lVert \bar y - \bar x \rVert / \lVert \bar x \rVert", source="Paper, eq. 7, over the base's norm",
     reading="How far the centre of all samples moved, comparable over depths.")
_add("change_intensity", "Change intensity", "dataset", "change", unit="units of the states", paired=True,
     function="row_changes", formula=r"\frac1N \sum_i \lVert y_i - x_i \rVert_2", source="Paper, figure 2",
     reading="How far a sample's pooled state moved, on average.")
_add("change_intensity_relative", "Change intensity, relative", "dataset", "change",
     unit="share of the base's mean norm", paired=True, function="change_intensity",
     resampled="change_intensity_bootstrap", fixed={"relative": True},
     formula=r"\tfrac1N \sum_i \lVert y_i - x_i \rVert / \lVert \bar x \rVert",
     source="Paper, figure 2, over the base's norm", reading="How far a sample moved, comparable over depths.")

# robustness to augmentation
_add("infonce", "InfoNCE", "views", "views", unit="nats", function="infonce_of_views",
     formula=r"-\frac1N \sum_i \ln \frac{e^{\cos(a_i, b_i) / \tau}}{\sum_j e^{\cos(a_i, b_j) / \tau}}",
     source="van den Oord et al. 2018", reading="Lower: views of one prompt are told apart from other prompts.")
_add("lidar", "LiDAR", "views", "views", unit="dimensions", function="lidar",
     formula=r"\operatorname{erank}\big(\Sigma_w^{-1/2} \Sigma_b \Sigma_w^{-1/2}\big)", source="Thilak et al. 2024",
     reading="Directions that separate prompts more than augmentation moves them.")
_add("dime", "DiME", "views", "views", unit="nats", function="dime_of_views",
     options={"alpha": "alpha", "seed": "seed"}, reading="Higher: the pairing of the views carries information.",
     formula=r"\mathbb{E}_\Pi\, S_\alpha(K_a, \Pi K_b \Pi^\top) - S_\alpha(K_a, K_b)", source="Skean et al. 2023")

# change of the weights
_add("weight_change", "Weight change", "weight", "weights", unit="Frobenius norm", paired=True,
     formula=r"\sum_{W \in \{q, k, v, o\}} \lVert W_{\mathrm{sft}} - W_{\mathrm{base}} \rVert_F",
     source="Paper, eq. 1", reading="How far the weights of a block moved.")
_add("weight_change_relative", "Weight change, relative", "weight", "weights", unit="share of the weights' norm",
     paired=True, formula=r"\lVert \Delta W \rVert_F / \lVert W_{\mathrm{base}} \rVert_F",
     source="Paper, eq. 1, over the base's norm", reading="How far weights moved, comparable over sizes.")
_add("weight_change_spectral_norm", "Spectral norm of the change", "weight", "weights", paired=True,
     formula=r"s_1(\Delta W)", reading="Length of the change along its strongest direction.")
_add("weight_change_effective_rank", "Effective rank of the change", "weight", "weights", unit="dimensions",
     paired=True, formula=r"\operatorname{erank}(\Delta W)", source="Roy and Vetterli 2007",
     reading="Number of directions that the change uses.")
_add("share_unchanged", "Entries exactly unchanged", "weight", "weights", unit="share of entries", paired=True,
     unchanged=1.0, function="share_unchanged", formula=r"\frac{\#\{(i, j) : W_{ij} = W'_{ij}\}}{m n}",
     source="Mukherjee et al. 2025",
     reading="Share of weights that tuning left bit for bit: rounding to 16 bits keeps many.")
_add("change_rank", "Rank of the change", "weight", "weights", unit="dimensions", paired=True,
     formula=r"\#\{k : s_k(\Delta W) > \epsilon\, \mathrm{rms}(W) (\sqrt m + \sqrt n)\}",
     reading="Directions of the change above the rounding of what is stored: at most its rank for LoRA.",
     source="Mukherjee et al. 2025")
_add("change_cosine", "Cosine of two changes", "weight", "weights", unit="1 = same direction", paired=True,
     unchanged=1.0, function="change_cosine",
     formula=r"\frac{\langle \Delta W, \Delta W' \rangle}{\lVert \Delta W \rVert \lVert \Delta W' \rVert}",
     reading="Whether two stages or two arms moved a weight the same way.", source="Ilharco et al. 2023")
_add("principal_angles", "Principal angles of two changes", "weight", "weights", unit="radians", paired=True,
     function="principal_angles", formula=r"\arccos s_i(U_k^\top U'_k)", source="Björck and Golub 1973",
     reading="Angles between the strongest directions of two changes: 0 for one space, π/2 for unrelated ones.")
_add("vector_rotation", "Singular vectors kept", "weight", "weights", unit="largest cosine", paired=True,
     unchanged=1.0, function="vector_rotation", formula=r"\max_j |\langle u_j, u'_i \rangle|",
     source="Shuttleworth et al. 2024", reading="Whether a strong direction of the tuned weight was one of the base's.")
_add("intruder_dimensions", "Intruder dimensions", "weight", "weights", unit="of the first 10", paired=True,
     function="intruder_dimensions",
     formula=r"\#\{i \le k : \max_j |\langle u_j, u'_i \rangle| < \varepsilon\}", source="Shuttleworth et al. 2024",
     variants=("another epsilon in place of 0.6", "another k in place of 10"),
     reading="Strong directions of the tuned weight that the base did not have; LoRA makes them, and they go with "
             "forgetting.")
_add("weight_norm", "Weight norm", "weight", "weights", unit="Frobenius norm", formula=r"\lVert W \rVert_F",
     reading="Size of the weights themselves.")

# predictions
_add("loss", "Loss", "logits", "predictions", unit="nats per token", formula=r"-\ln p(\mathrm{gold})",
     reading="Lower is better; 0 is certainty.", source="Shannon 1948")
_add("perplexity", "Perplexity", "logits", "predictions", formula=r"\exp(\mathrm{loss})",
     reading="Lower is better; number of equally likely tokens with the same loss.", source="Jelinek et al. 1977")
_add("perplexity_ratio", "Perplexity ratio", "logits", "predictions", paired=True, unchanged=1.0,
     formula=r"\exp(\mathrm{loss}_b - \mathrm{loss}_a)", reading="Below 1: the later model predicts better.")
_add("accuracy", "Accuracy", "logits", "predictions", unit="share", formula=r"[\arg\max p = \mathrm{gold}]",
     reading="Share of tokens (or of items, where answers are scored) that are right.", source="Paper, figure 3")
_add("entropy", "Entropy", "logits", "predictions", unit="nats", formula=r"-\sum_v p_v \ln p_v",
     reading="How undecided the prediction is.", source="Shannon 1948")
_add("gold_probability", "Probability of the right token", "logits", "predictions", formula=r"p(\mathrm{gold})",
     source="nostalgebraist 2020", reading="Higher is better: how much of the prediction the right token has.")
_add("gold_rank", "Rank of the right token", "logits", "predictions", unit="0 = most likely",
     formula=r"\#\{v : p_v > p(\mathrm{gold})\}", source="nostalgebraist 2020",
     reading="0 where the right token is the most likely one.")

# agreement of predictions
_add("kl", "KL divergence", "logits", "agreement", unit="nats", paired=True, formula=r"\sum_v p_v \ln (p_v / q_v)",
     source="Kullback and Leibler 1951", reading="0 where both models predict the same.")
_add("top1_agreement", "Same most likely token", "logits", "agreement", unit="share of positions", paired=True,
     unchanged=1.0, formula=r"[\arg\max p = \arg\max q]", source="Paper's code", reading="1: both say the same next.")
_add("top_k_overlap", "Common tokens of the top lists", "logits", "agreement", unit="share", paired=True,
     unchanged=1.0, formula=r"|\mathrm{top}_k(p) \cap \mathrm{top}_k(q)| / k",
     reading="Whether the same few tokens are in question, in whatever order.")

# gradients
_add("gradient_norm", "Gradient norm", "gradient", "gradients", unit="Frobenius norm", formula=r"\lVert g \rVert_F",
     source="Paper, figure 4", reading="How strongly the loss pulls at a block's weights.")
_add("gradient_norm_relative", "Gradient norm, relative", "gradient", "gradients", unit="per norm of the weights",
     formula=r"\lVert g \rVert / \lVert W \rVert", reading="The same, comparable over matrices of different size.")
_add("fisher", "Fisher information", "gradient", "gradients", unit="sum of squared gradients", formula=r"\sum g^2",
     source="Kirkpatrick et al. 2017 (its diagonal, from the labels of the data)",
     reading="How much the loss depends on a block's weights, by squared gradients.")
_add("taylor", "First-order importance", "gradient", "gradients", unit="nats", formula=r"\big|\sum w\, g\big|",
     source="Molchanov et al. 2017", reading="First-order change of the loss if the weights were removed.")

# importance of blocks
_add("block_influence", "Block influence", "block", "importance", function="block_influence",
     formula=r"1 - \cos(z_{\mathrm{in}}, z_{\mathrm{out}})", source="Men et al. 2024",
     reading="How far a block turns the states that pass it: near 0, it could be left out.")
_add("angular_distance", "Angular distance", "block", "importance", unit="angle / π", function="angular_distance",
     formula=r"\arccos \cos(z_{\mathrm{in}}, z_{\mathrm{out}}) / \pi", source="Gromov et al. 2024",
     reading="The same as an angle: 0 for a block that turns nothing, 1 for one that reverses.")
_add("ila_score", "ILA score", "block", "importance", formula=r"s_i,\ \Delta W_i \sigma(s_i)",
     source="Shi et al. 2024 (ILA)", reading="Higher: the block's update matters more for the training loss.")
_add("cka_novelty", "CKA novelty", "block", "importance", unit="1 − debiased CKA",
     formula=r"1 - \operatorname{CKA}(Z_{\mathrm{in}}, Z_{\mathrm{out}})", reading="0 where states only pass on.")
_add("rank_plateau", "Rank plateau", "block", "importance", unit="−|change of ln effective rank|",
     formula=r"-\Big|\ln \frac{\operatorname{erank} Z_{\mathrm{out}}}{\operatorname{erank} Z_{\mathrm{in}}}\Big|",
     reading="0 where a block keeps the effective rank of the states.")
_add("weight_snr", "Weights: signal to noise", "weight", "importance", unit="energy above / below noise",
     formula=r"\sum_{s_k > s^*} s_k^2 \Big/ \sum_{s_k \le s^*} s_k^2", reading="s*: the largest of random weights.")
_add("eva_share", "EVA's share", "block", "importance", unit="share of the budget", source="Paischer et al. 2024",
     formula=r"\sum_{m \in b} r_m c_m \Big/ \sum_m r_m c_m", reading="Rank that EVA gives the block (c: parameters).")
_add("relative_update", "Change by tuning", "weight", "importance", unit="share of the weights' norm", paired=True,
     formula=r"\lVert \Delta W \rVert_F / \lVert W \rVert_F", reading="How far training moved a tuned matrix.")
_add("update_norm", "Norm of the update", "block", "importance", unit="Frobenius norm",
     formula=r"\lVert \Delta W \rVert_F", reading="How far training moved the unit: a control for learned scores.")
