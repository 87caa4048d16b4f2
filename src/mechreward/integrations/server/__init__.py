"""The reward server: ``mechreward serve``."""
