"""``marble status --watch``."""
