"""Measurements of fedsim against a bare PyTorch loop and against other frameworks."""
