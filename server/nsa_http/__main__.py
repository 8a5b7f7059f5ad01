"""`python -m nsa_http` is `nsa-serve`."""

import sys

from nsa_http.cli import main

if __name__ == "__main__":
    sys.exit(main())
