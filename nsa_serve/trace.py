"""Block traces: whether an engine can give the trace that a request asks for.

A token's trace is the selection of the query that led to it: the last prompt token for the first.
No torch here: the recorder is `nsa_kernels.block_trace`.
"""

from nsa_serve.errors import RequestError
from nsa_serve.messages import EngineInfo, TraceGeometry
from nsa_serve.request import MAX_TRACED_LAYERS, MAX_TRACED_TOKENS, TraceParams


def check_trace(params: TraceParams, info: EngineInfo) -> TraceGeometry:
    """Return what is known of the traced model. Raises RequestError when it cannot be traced."""
    geometry = info.trace
    if geometry is None:
        raise RequestError(
            f"device {info.device} has no trace yet; leave nsa_trace out or serve with "
            "--device cpu",
            param="nsa_trace",
        )
    if not geometry.costs.uses_slc:
        raise RequestError(
            "the model's gates switch block selection off, so there is nothing to trace; "
            "leave nsa_trace out",
            param="nsa_trace",
        )
    if not 1 <= params.max_tokens <= MAX_TRACED_TOKENS:
        raise RequestError(
            f"nsa_trace.max_tokens must be from 1 to {MAX_TRACED_TOKENS}, got {params.max_tokens}",
            param="nsa_trace.max_tokens",
        )
    _check_layers(params.layers, geometry.num_layers)
    return geometry


def traced_layers(params: TraceParams, geometry: TraceGeometry) -> tuple[int, ...]:
    """Return the layers that the params name, in their order."""
    return tuple(range(geometry.num_layers)) if params.layers is None else params.layers


def _check_layers(layers: tuple[int, ...] | None, num_layers: int) -> None:
    param = "nsa_trace.layers"
    if layers is None:
        if num_layers > MAX_TRACED_LAYERS:
            raise RequestError(
                f"the model has {num_layers} layers and at most {MAX_TRACED_LAYERS} can be traced; "
                f"name them in {param}",
                param=param,
            )
        return
    if not 1 <= len(layers) <= MAX_TRACED_LAYERS:
        raise RequestError(
            f"{param} must name 1 to {MAX_TRACED_LAYERS} layers, got {len(layers)}", param=param
        )
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise RequestError(
                f"{param} names layer {layer}, but the model has layers 0 to {num_layers - 1}",
                param=param,
            )
    if len(set(layers)) < len(layers):
        raise RequestError(f"{param} names a layer twice; name each once", param=param)
