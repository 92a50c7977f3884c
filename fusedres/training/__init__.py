"""Data, training loop and checkpoints: what the command line trains with. Library users never import it."""
