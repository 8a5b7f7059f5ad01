"""The API against its own description: generated requests, valid and invalid, and every answer.

Deterministic and small here; docs/serving.md has the command of a long run.
"""

import schemathesis
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig

from tests.server.fake_engine import FakeEngine, make_app

_CONFIG = SchemathesisConfig.from_dict(
    {
        "seed": 1,
        "generation": {"mode": "all", "max-examples": 4, "deterministic": True, "database": "none"},
        "phases": {
            "examples": {"enabled": True},
            "coverage": {"enabled": True},
            "fuzzing": {"enabled": True},
            "stateful": {"enabled": False},
        },
    }
)
_CHECK_NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(FakeEngine()), config=_CONFIG)


@schema.parametrize()
def test_answers_are_as_described(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS.get_by_names(_CHECK_NAMES))
