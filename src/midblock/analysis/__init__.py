"""What fine-tuning changed, and where: each command of the analysis as a function (room 4)."""
