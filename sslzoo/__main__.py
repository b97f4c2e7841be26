"""``python -m sslzoo`` is ``sslzoo``."""

from sslzoo.cli.main import main

raise SystemExit(main())
