"""`python -m nsa_client` is `nsa-client`."""

import sys

from nsa_client.cli import main

sys.exit(main())
