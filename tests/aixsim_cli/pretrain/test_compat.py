"""Each patch of torchtitan has a test that fails without it."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra import parallelize

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.models.titan.model import build_model, meta_model, model_args
from aixsim_cli.models.titan.saved import read_checkpoint
from aixsim_cli.pretrain import compat
from aixsim_cli.pretrain.converter import TransformConverter
from aixsim_cli.run.device import prepare
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.state import state_of

REPOSITORY = Path(__file__).parents[3]
TRANSFORM = {"transform": "optical", "layer_name_to_config": {"default": {}}}
ARGS = model_args("aixsim", "debug", 64)
PATCHES = [
    function
    for name, function in inspect.getmembers(compat, inspect.isfunction)
    if function.__module__ == compat.__name__ and not name.startswith("_")
] + [prepare]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_every_patch_says_what_it_is_for(patch):
    told = inspect.getdoc(patch)
    for part in ("Breaks: ", "Upstream: ", "Remove when: "):
        assert part in told, part
    path, _, name = re.search(r"Test: (\S+)", told)[1].partition("::")
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", text, re.MULTILINE), name


class Count(TorchDispatchMode):
    """How often an op is called."""

    def __init__(self, op):
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func == self.op
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["optical_linear", "optical_attention"])
def test_selective_recomputation_saves_simulated_ops(name):
    compat.save_simulated_ops()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.1
        for name, p in meta_model(ARGS).named_parameters()
    }
    transform = parse_transform(TRANSFORM, source="t.yaml")
    model = build_model(ARGS, weights, seq_len=16, transform=transform).train()
    tokens = torch.randint(64, (1, 16), generator=generator)
    config = ActivationCheckpoint(mode="selective", selective_ac_option="op")
    apply_ac(model, config, op_sac_save_list=parallelize._op_sac_save_list)
    state_of(model).begin_step(1)
    with Count(getattr(torch.ops.aixsim, name).default) as count:
        loss = model(tokens).sum()
        forward = count.calls
        loss.backward()
    assert forward == {"optical_linear": 14, "optical_attention": 2}[name]
    assert count.calls == forward


def test_ranges_begin_unset():
    model = meta_model(ARGS)
    config = PretrainConfig(transform=TRANSFORM)
    TransformConverter(config, None).convert(model)
    model.to_empty(device="cpu")
    for module in state_of(model).modules.values():
        module.ranges.fill_(torch.nan)
    with torch.no_grad():
        model.init_weights()
    for module in state_of(model).modules.values():
        assert module.ranges.tolist() == [[torch.inf, -torch.inf]] * len(module.ranges)


def test_shards_begin_as_one_rank_does(aixsim, tmp_path):
    def first_weights(ranks):
        folder = tmp_path / str(ranks)
        aixsim(
            "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
            "builtin", "--batch-size", 2 // ranks, "--seq-len", 32, "--steps", 1,
            "--learning-rate", "1e-30", "--mixed-precision-param", "float32",
            "--data-parallel-shard-degree", ranks, "--save-path", folder / "c.yaml",
        )  # fmt: skip
        aixsim("pretrain", "--config", folder / "c.yaml", "--job.dump_folder", folder, ranks=ranks)
        found = read_checkpoint(folder / "checkpoint" / "step-1").state_dict
        return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}

    one, two = first_weights(1), first_weights(2)
    assert one.keys() == two.keys() and len(one) > 20
    for name in one:
        assert torch.equal(one[name], two[name]), name
