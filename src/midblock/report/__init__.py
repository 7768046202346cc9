"""From results to files and printed readings (room 7)."""

from midblock.report.save import Result, save_result

__all__ = ["Result", "save_result"]
