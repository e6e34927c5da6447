"""What the network is told besides the noise, and its dropout for guidance."""
