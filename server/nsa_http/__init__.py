"""The OpenAI-compatible HTTP server: wire protocol, streaming, authentication and command line."""
