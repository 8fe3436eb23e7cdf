"""What a run says on its standard error, and what it keeps quiet of."""

import logging
import warnings

import pytest

from aixsim_cli.run import log


@pytest.fixture(autouse=True)
def loggers_put_back():
    root, ours = logging.getLogger(), logging.getLogger("aixsim")
    before = root.handlers[:], root.level, ours.level
    with warnings.catch_warnings():
        yield
    root.handlers[:], root.level, ours.level = before[0], before[1], before[2]


def test_rank_zero_speaks_and_the_others_warn(capsys, monkeypatch):
    monkeypatch.delenv("AIXSIM_DEBUG", raising=False)
    for is_main in (True, False):
        log.set_up(is_main=is_main)
        logging.getLogger("aixsim").info("by %s", is_main)
        logging.getLogger("aixsim").warning("warned by %s", is_main)
        logging.getLogger("library").info("library")
    # once each, though the logs were set up twice
    assert capsys.readouterr().err.splitlines() == ["by True", "warned by True", "warned by False"]


def test_noise_is_dropped_but_for_who_looks_for_it(capsys, monkeypatch):
    monkeypatch.delenv("AIXSIM_DEBUG", raising=False)
    for debug in (False, True):
        if debug:
            monkeypatch.setenv("AIXSIM_DEBUG", "1")
        log.set_up(is_main=True, noise=("will be overridden",))
        logging.getLogger().warning("ENV[A] = %s will be overridden to 2", debug)
        logging.getLogger().warning("real %s", debug)
    said = capsys.readouterr().err.splitlines()
    assert said == ["real False", "ENV[A] = True will be overridden to 2", "real True"]


def test_who_listens_goes_on(caplog):
    log.set_up(is_main=True)
    logging.getLogger("aixsim").info("heard")
    assert "heard" in caplog.text
