"""Averaged, converted and exported weights."""
