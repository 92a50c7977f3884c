"""Experiments of the paper at a size that a CPU manages: what the command line runs."""
