"""torchtitan runs on the device that there is."""

import subprocess
import sys

import pytest

from aixsim_cli.run.device import device_type


@pytest.mark.parametrize("first", ["torchtitan", "torchtitan.tools.utils", "torchtitan.train"])
def test_torchtitan_sees_it_whatever_is_imported_first(first):
    program = (
        f"import aixsim_cli, {first}; from torchtitan.tools import utils; print(utils.device_type)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[-1:] == [device_type()], done.stderr
