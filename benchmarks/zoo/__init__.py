"""``make zoo``: models of timm and transformers, each through everything that a user does."""
