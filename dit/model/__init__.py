"""The networks: plain single-device torch code."""
