"""Tool calls: what a request may ask for, how a model writes calls, and how they are read."""
