"""Shards of images: written, checked, streamed."""
