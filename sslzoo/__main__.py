"""``python -m sslzoo`` runs the ``sslzoo`` command."""

from sslzoo.cli.main import main

raise SystemExit(main())
