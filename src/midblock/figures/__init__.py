"""Figures for tables of results: matplotlib `Figure` objects, built without pyplot or a display.

Every figure takes data that is already computed and returns a `matplotlib.figure.Figure`; `save_figure` writes it as
SVG and PDF, byte for byte the same for the same data, with words that stay words. Labels, units and the value of "no
change" come from `midblock.quantities`; fonts, sizes and colours from midblock.mplstyle, on top of which a user's own
style file lies (``MIDBLOCK_STYLE``, `figure_style`). Colours are Okabe and Ito's, told apart by colour-blind readers;
markers and line styles tell the series apart in print as well. Where a value is undefined the line has a gap.
"""

from midblock.figures.arms import scatter_pareto, segment_bars
from midblock.figures.depth import depth_lines, lines
from midblock.figures.matrices import heatmap
from midblock.figures.style import MAX_HEIGHT, figure_style, save_figure

__all__ = ["MAX_HEIGHT", "depth_lines", "figure_style", "heatmap", "lines", "save_figure", "scatter_pareto",
           "segment_bars"]
