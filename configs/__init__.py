"""Hydra's `pkg://smalti.configs` looks for this file."""
