"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine takes any time for an example: how long one takes says nothing about the code.
settings.register_profile("graft", deadline=None)
settings.load_profile("graft")
