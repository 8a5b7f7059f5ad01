"""`nsa_trace`: the request field that asks for the selected blocks, and how they are sent."""

from typing import Any

from nsa_http.protocol import GenerationBody, TraceOptions
from nsa_http.state import ServerState
from nsa_serve.errors import RequestError
from nsa_serve.messages import TraceGeometry
from nsa_serve.request import RequestOutput, TraceParams
from nsa_serve.trace import traced_layers


def trace_params(state: ServerState, body: GenerationBody, num_prompts: int) -> TraceParams | None:
    """Return what to trace, None when nothing. Raises RequestError where that is not allowed."""
    options = body.nsa_trace
    if not options:
        return None
    if not state.config.enable_trace:
        raise RequestError(
            "nsa_trace is off on this server; leave it out or start with --enable-trace",
            param="nsa_trace",
        )
    if body.num_samples != 1:
        raise RequestError(f"nsa_trace needs n=1, got n={body.num_samples}", param="nsa_trace")
    if num_prompts != 1:
        raise RequestError(f"nsa_trace needs one prompt, got {num_prompts}", param="nsa_trace")
    return _params(options)


def _params(options: "bool | TraceOptions") -> TraceParams:
    if isinstance(options, bool):
        return TraceParams()
    default = TraceParams()
    return TraceParams(
        layers=None if options.layers is None else tuple(options.layers),
        max_tokens=default.max_tokens if options.max_tokens is None else options.max_tokens,
    )


def make_trace_writer(state: ServerState, body: GenerationBody) -> "TraceWriter | None":
    """Return the writer of a request's traces, None when it has none."""
    geometry = state.require_engine().info.trace
    if not body.nsa_trace or geometry is None:
        return None
    return TraceWriter(geometry, _params(body.nsa_trace))


class TraceWriter:
    """Turns the blocks of outputs into `nsa_trace` objects."""

    def __init__(self, geometry: TraceGeometry, params: TraceParams) -> None:
        spec = geometry.costs.spec
        self._costs = geometry.costs
        self._facts = {
            "block_size": spec.block_size,
            "num_selected_blocks": spec.num_selected_blocks,
            "num_init_blocks": spec.num_init_blocks,
            "num_local_blocks": spec.num_local_blocks,
            "window_size": spec.window_size,
            "num_layers": geometry.num_layers,
            "num_kv_heads": geometry.num_kv_heads,
            "layers": list(traced_layers(params, geometry)),
        }

    def entry(self, output: RequestOutput) -> dict[str, Any]:
        """Return the object of one delta.

        position: of the first token's query in the sequence. read_bytes, dense_bytes: what each
        query needs of the cache over all layers, and what dense attention would. truncated: not
        all tokens of the delta are traced, because the bound is reached.
        """
        blocks = output.blocks or []
        num_tokens = len(output.token_ids)
        position = output.num_prompt_tokens + output.num_output_tokens - num_tokens - 1
        reads = [self._costs.of_rows([position + 1 + i]) for i in range(len(blocks))]
        return {
            **self._facts,
            "position": position,
            "tokens": blocks,
            "read_bytes": [item.cmp_bytes + item.slc_bytes + item.swa_bytes for item in reads],
            "dense_bytes": [item.dense_bytes for item in reads],
            "truncated": len(blocks) < num_tokens,
        }
