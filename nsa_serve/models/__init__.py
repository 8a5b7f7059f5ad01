"""Checkpoints: families and their config files, weight names, weight loading.

Only `weights` and `dequantize` import torch; the rest is plain Python.
"""
