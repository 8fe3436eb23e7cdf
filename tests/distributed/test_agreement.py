"""One rank, two replicas and two shards do the same maths, digitally and optically."""

import json

import pytest
import yaml

from aixsim_cli.backends.titan import device

device.prepare()

from aixsim_cli.backends.titan.spec import load_tokenizer  # noqa: E402
from tests.aixsim_cli.checkpoint.test_convert import random_weights  # noqa: E402

STEPS, SEQ_LEN = 4, 32
LAYOUTS = {"one": (1, 1, 8), "replicas": (2, 1, 4), "shards": (1, 2, 4)}
