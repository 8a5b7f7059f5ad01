"""NSA operators: the fp32 specification, and the paged operators that serve."""
