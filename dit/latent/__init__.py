"""Images <-> what the network sees."""
