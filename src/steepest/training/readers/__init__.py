"""Readers of data files: each one gives tensors or one clear message, and none of them unpickles."""
