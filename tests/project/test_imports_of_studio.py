"""What importing the room of Label Studio loads."""

from __future__ import annotations

import subprocess
import sys

from tests.unit.studio.test_client import LEGACY


def test_import_is_light() -> None:
    """Importing, and answering for a legacy token, does not load label-studio-sdk."""
    code = (
        "import sys; from celestial_backend.settings import Settings;"
        " from celestial_backend.studio.client import Studio;"
        " import celestial_backend.pictures.reader;"
        f" Studio(Settings(label_studio_api_key={LEGACY!r})).authorization();"
        " sys.exit('label_studio_sdk' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
