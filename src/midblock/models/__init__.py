"""Models: loading, anatomy, checkpoints on disk, and what is known of published pairs."""
