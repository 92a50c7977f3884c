"""Fixtures for the tests of what is combined with the nets."""

from ecosystem_nets import fused_by

__all__ = ["fused_by"]
