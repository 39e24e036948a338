"""A private training's check of its model is made once for all that are the same."""

from __future__ import annotations

from tests import tried_once

tried_once.install()
