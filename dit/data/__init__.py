"""Shards of images: packed, indexed, read in an order that is a pure function."""
