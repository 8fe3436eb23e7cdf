"""One rank, replicas, shards, both, and accumulated batches do the same maths.

All documents are one and the same window, so every layout sees the same global batch; all runs
start from one checkpoint. Without the mend of DDP's averaging its gradient norm is half of the
others'.
"""

import json
import os

import pytest
import torch

from aixsim_cli.backends.titan import device

device.prepare()

from aixsim_cli.backends.titan.model import meta_model  # noqa: E402
from aixsim_cli.backends.titan.spec import load_tokenizer, model_args  # noqa: E402
from aixsim_cli.checkpoint.dcp import read_checkpoint, write_checkpoint  # noqa: E402

pytestmark = pytest.mark.timeout(1200)
SEQ_LEN = 32
# a quantised model's roundings spread: it is compared over fewer steps
STEPS = {"digital": 20, "optical": 4}
# replicate, shard, tensor, sequences a rank and micro-batch, micro-batches
LAYOUTS = {
    "one": (1, 1, 1, 4, 1),
    "replicas": (2, 1, 1, 2, 1),
    "shards": (1, 2, 1, 2, 1),
    "hybrid": (2, 2, 1, 1, 1),
    "tensor": (1, 1, 2, 4, 1),
    "accumulated": (1, 1, 1, 1, 4),
}
if "AIXSIM_TEST_LONG" not in os.environ:  # four processes, on two cores
    del LAYOUTS["hybrid"]
OTHERS = [name for name in LAYOUTS if name != "one"]
TRANSFORM = "layer_name_to_config:\n  default: {q_noise: false}\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text whose every document is SEQ_LEN + 1 tokens, and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = load_tokenizer("builtin")
    ids = tokenizer.encode("The interpreter evaluates each expression in order. " * 40)
    text = tokenizer.decode(ids[:SEQ_LEN])
    while len(tokenizer.encode(text, add_eos=True)) > SEQ_LEN + 1:
        text = text[:-1]
    assert len(tokenizer.encode(text, add_eos=True)) == SEQ_LEN + 1
    (folder / "same.jsonl").write_text((json.dumps({"text": text}) + "\n") * 64)
    (folder / "transform.yaml").write_text(TRANSFORM)
    generator = torch.Generator().manual_seed(0)
    model = meta_model(model_args("aixsim", "debug", tokenizer.get_vocab_size()))
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.05
        if p.dim() == 2
        else torch.ones(p.shape)
        for name, p in model.named_parameters()
    }
    write_checkpoint(weights, folder / "start")
    return folder


@pytest.fixture(scope="module", params=["digital", "optical"])
def runs(request, data, aixsim):
    """layout -> (logged records, final ranges)."""
    results = {}
    for name, (replicate, shard, tensor, batch, accumulation) in LAYOUTS.items():
        folder = data / request.param / name
        ranks = replicate * shard * tensor
        transform = ["--transform-config", data / "transform.yaml"]
        aixsim(
            "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
            "local", "--dataset-path", data / "same.jsonl", "--batch-size", batch, "--seq-len",
            SEQ_LEN, "--steps", STEPS[request.param], "--gradient-accumulation", accumulation,
            "--learning-rate", "1e-3", "--mixed-precision-param",
            "float32", "--data-parallel-replicate-degree", replicate,
            "--data-parallel-shard-degree", shard, "--tensor-parallel-degree", tensor,
            "--save-path", folder / "c.yaml",
            *(transform if request.param == "optical" else []),
        )  # fmt: skip
        aixsim(
            "pretrain", "--config", folder / "c.yaml", "--job.dump_folder", folder,
            "--metrics.log_freq", 1, "--checkpoint.initial_load_path", data / "start",
            # the clipping must not hide a gradient of another size
            "--training.max_norm", "1e9", *(["--nproc-per-node", ranks] if ranks > 1 else []),
        )  # fmt: skip
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        state = read_checkpoint(folder / "checkpoint" / f"step-{STEPS[request.param]}").state_dict
        ranges = {key: value for key, value in state.items() if key.endswith(".ranges")}
        results[name] = [json.loads(line) for line in lines], ranges
    return request.param, results


@pytest.mark.parametrize("layout", OTHERS)
def test_loss_and_gradient_norm(runs, layout):
    kind, results = runs
    tolerance = 1e-4 if kind == "digital" else 1e-3
    if layout == "accumulated" and kind == "digital":
        tolerance = 1e-5
    for key in ("loss", "grad_norm"):
        ours = [record[key] for record in results[layout][0]]
        alone = [record[key] for record in results["one"][0]]
        assert ours == pytest.approx(alone, rel=tolerance), key


@pytest.mark.parametrize("layout", OTHERS)
def test_ranges(runs, layout):
    kind, results = runs
    ranges, alone = results[layout][1], results["one"][1]
    assert len(alone) == (16 if kind == "optical" else 0) and ranges.keys() == alone.keys()
    for name in alone:
        assert torch.isfinite(alone[name]).all(), name
        torch.testing.assert_close(ranges[name], alone[name], rtol=1e-2, atol=1e-3, msg=name)
