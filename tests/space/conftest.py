import os

import pytest
from space_server import make_film, make_students, serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="session")
def students(folder):
    return make_students(folder)


@pytest.fixture(scope="session")
def film(folder):
    return make_film(folder)


@pytest.fixture
def here(students, monkeypatch):
    """The page's modules in this process, with the tiny students."""
    monkeypatch.setenv("FEWSTEP_SPACE_STUDENTS", students)
    monkeypatch.delenv("FEWSTEP_SPACE_HUB", raising=False)
    import racing
    return racing


@pytest.fixture(scope="session")
def server(students, film, folder):
    """(address, process id) of a page with all of them."""
    with serving(os.pathsep.join((students, str(film))), folder) as (url, pid):
        yield url, pid
