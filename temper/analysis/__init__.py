"""Mechanistic measurements: tensors in, numbers out."""
