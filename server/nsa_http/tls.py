"""TLS: the server's certificate, and what `nsa-serve health` trusts."""

import ssl

from nsa_http.config import ServerConfig
from nsa_serve.errors import ConfigError


def server_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Return the context to listen with, or None for plain HTTP. Raises ConfigError."""
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # With a password given, a key that needs one fails instead of asking on the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except OSError as error:
        raise ConfigError(
            f"cannot use --ssl-certfile {config.ssl_certfile} with "
            f"--ssl-keyfile {config.ssl_keyfile or config.ssl_certfile}: {_reason(error)}; give "
            "PEM files: the chain, the server's certificate first, and its key without a password"
        ) from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except OSError as error:
            raise ConfigError(
                f"cannot use --ssl-ca-certs {config.ssl_ca_certs}: {_reason(error)}; give a PEM "
                "file of the authorities that sign client certificates"
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def own_client_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Return the context to ask a server with these settings on this machine; None without TLS.

    It accepts exactly the server's own certificate, for whatever name that was made, and shows it
    when the server asks for one. Raises ConfigError.
    """
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(config.ssl_certfile)
        if config.ssl_ca_certs is not None:
            context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except OSError as error:
        raise ConfigError(
            f"cannot read --ssl-certfile {config.ssl_certfile}: {_reason(error)}"
        ) from None
    return context


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a certificate or key").lower().replace("_", " ")
    return error.strerror or str(error)
