"""Which layers matter: learned importance (ILA), overlap of selections, and a locator without training (room 6)."""
