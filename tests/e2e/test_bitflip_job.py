"""Two paradigms in one model through the whole chain: pretrain, convert, evaluate."""

import json


def test_bitflip_linears_with_optical_attention(aixsim, tmp_path):
    aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
        "builtin", "--batch-size", 4, "--seq-len", 64, "--steps", 8, "--learning-rate", "3e-3",
        "--mixed-precision-param", "float32", "--save-path", tmp_path / "c.yaml",
        "--transform-config", "configs/transforms/bitflip-optical.yaml",
    )  # fmt: skip
    run, folder = tmp_path / "run", tmp_path / "hf"
    done = aixsim(
        "pretrain", "--config", tmp_path / "c.yaml", "--job.dump_folder", run,
        "--metrics.log_freq", 1,
    )  # fmt: skip
    assert "bitflip: 14 modules match fc" in done.stderr
    assert "optical: 2 modules match attention" in done.stderr
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3
    checkpoint = run / "checkpoint" / "step-8"
    aixsim("convert-ckpt", "aixsim", "debug", checkpoint, folder)
    words = ("--num-batches", 2, "--json")
    result = json.loads(aixsim("eval", "ppl", folder, *words).stdout)
    assert result["transform"] == "bitflip+optical"
    assert 5 < result["nll"] < losses[0]
