"""Structured output: grammars that the text of a request must match (llguidance)."""
