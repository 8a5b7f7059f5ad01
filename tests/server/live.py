"""A real server over a fake engine: `python -m tests.server.live [flags of serve]`.

The prompt "die" kills the engine after two tokens; a fake that cannot start is `--revision broken`.
"""

import sys
from collections.abc import AsyncIterator, Callable

from nsa_http.cli import make_parser
from nsa_http.config import make_settings
from nsa_http.logs import configure_logging
from nsa_http.server import run
from nsa_serve.config import EngineConfig
from nsa_serve.errors import ModelError, NSAServeError
from nsa_serve.messages import LoadProgress
from nsa_serve.metrics import Metrics
from nsa_serve.request import RequestOutput, SamplingParams
from tests.server.fake_engine import FakeEngine


class LiveEngine(FakeEngine):
    """Slow enough to be interrupted."""

    def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, **options: object
    ) -> AsyncIterator[RequestOutput]:
        if self.tokenizer.decode(prompt_token_ids, skip_special_tokens=False) == "die":
            self.die_after = 2
        return super().generate(prompt_token_ids, params, **options)  # type: ignore[arg-type]


async def start_engine(
    config: EngineConfig,
    *,
    on_progress: Callable[[LoadProgress], None] | None = None,
    metrics: Metrics | None = None,
) -> LiveEngine:
    if config.revision == "broken":
        raise ModelError("the checkpoint is broken; fetch it again")
    engine = LiveEngine(reply="x" * 100)
    engine.delay_s = 0.02
    if on_progress is not None:
        on_progress(LoadProgress("weights", 1, 1))
    return engine


def main() -> int:
    flags = vars(make_parser().parse_args(["serve", *sys.argv[1:]]))
    del flags["command"]
    settings = make_settings(flags, None)
    configure_logging(settings.server.log_level, settings.server.log_format)
    try:
        return run(settings, start_engine=start_engine)
    except NSAServeError as error:
        sys.stderr.write(f"nsa-serve: error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
