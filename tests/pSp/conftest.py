"""Small networks in place of those of a pSp training's losses."""

import pytest
from psp_networks import FakeIdentity, FakePerceptual


@pytest.fixture
def fake_networks(monkeypatch):
    monkeypatch.setattr("pSp.losses.build_perceptual", lambda *_, **__: FakePerceptual())
    monkeypatch.setattr("pSp.losses.build_identity", lambda *_, **__: FakeIdentity())
