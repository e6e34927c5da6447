"""The module, the run, checkpoints and callbacks."""
