"""Fixtures of the tests in this folder."""

import pytest
from generating import new_generator, write_ckpt


@pytest.fixture(scope="module", params=["w++", "w"])
def generator(request):
    return new_generator(w_space=request.param == "w")


@pytest.fixture(scope="module")
def ckpt(generator, tmp_path_factory):
    return write_ckpt(tmp_path_factory.mktemp("ckpt ü") / "000007.pt", generator)


@pytest.fixture(scope="module")
def wpp_ckpt(tmp_path_factory):
    return write_ckpt(tmp_path_factory.mktemp("wpp") / "000007.pt", new_generator())
