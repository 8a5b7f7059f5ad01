"""Models: families and their config files, weight names, weight loading, layers.

`families` and what it imports are plain Python: a config is read without torch.
"""
