"""Entry point of the web server: ``label-studio-ml start .``, ``python _wsgi.py`` or ``gunicorn _wsgi:app``."""

import sys

from celestial_backend.web.server import serve, wsgi_app

if __name__ == "__main__":
    sys.exit(serve())
else:
    app = wsgi_app()
