"""These tests build every model from a config; nothing may ask the network, not even for a version."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
