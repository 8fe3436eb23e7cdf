"""A Hugging Face folder that is damaged, or a stranger's, is told by file and remedy: exit 2."""

import io
import json
import math
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaModel
from typer.testing import CliRunner

from aixsim_cli.errors import UserError
from aixsim_cli.main import app
from aixsim_cli.models.hf.saved import load_model, ranges_of, write_model
from aixsim_cli.models.load import load_model as load_for_eval
from aixsim_cli.transforms.read import parse_transform

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"
RUN = "code-was-run"


def config(**values):
    def damage(folder):
        edit(folder / "config.json", **values)

    return damage


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def generation(**values):
    return lambda folder: edit(folder / "generation_config.json", **values)


def tensors_without(name):
    def damage(folder):
        found = load_file(folder / WEIGHTS)
        del found[name]
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def quantization(**values):
    def damage(folder):
        own = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit(folder / "config.json", quantization_config=own | values)

    return damage


def text(name, content):
    def damage(folder):
        (folder / name).write_bytes(content)

    return damage


def tensors(**changes):
    """Change tensors, "_" for "." in their names."""

    def damage(folder):
        found = load_file(folder / WEIGHTS)
        for name, change in changes.items():
            found[name] = change(found.get(name))
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def cut(share):
    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * share)])

    return damage


class Code:
    """Makes a file where it is unpickled."""

    def __init__(self, folder):
        self.path = folder.parent / RUN

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def pickled(name):
    def damage(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps({"a": Code(folder)}))

    return damage


def pickle_of_torch(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"a": Code(folder)}, folder / "pytorch_model.bin")


def integers_in_a_pickle(folder):
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(found | {UP: found[UP].to(torch.int32)}, folder / "pytorch_model.bin")


def index(content):
    def damage(folder):
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        (folder / INDEX).write_text(json.dumps(content))

    return damage


def index_of_another_save(folder):
    index({"weight_map": {UP: "model-1.safetensors", "more": "model-1.safetensors"}})(folder)


def index_beyond(folder):
    shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
    names = dict.fromkeys(load_file(folder / WEIGHTS), "../outside.safetensors")
    index({"weight_map": names})(folder)


def make_plain(folder):
    model = load_model(str(folder))
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_model(model, folder, "plain")


def plain_transform(content):
    def damage(folder):
        make_plain(folder)
        (folder / "transform.yaml").write_text(content)

    return damage


def plain_state(folder):
    plain_transform("transform: optical\n")(folder)
    (folder / "transform.safetensors").write_bytes(b"")


def plain_ranges(change):
    """A folder of the form --plain, with its ranges changed."""

    def damage(folder):
        make_plain(folder)
        found = load_file(folder / STATE)
        change(found)
        save_file(found, folder / STATE)

    return damage


STATE = "transform.safetensors"
RANGES = "model.layers.0.mlp.up_proj.ranges"
NAN = float("nan")
# name -> which model, the damage, and what is said of it
CASES = {
    "cut": ("digital", cut(0.5), r"model\.safetensors: damaged: \d+ bytes"),
    "one byte": ("digital", cut(1e-9), r"model\.safetensors: damaged"),
    "empty": ("digital", text(WEIGHTS, b""), r"model\.safetensors: damaged: 0 bytes"),
    "header of 16 EiB": ("digital", text(WEIGHTS, b"\xff" * 64), r"model\.safetensors: damaged"),
    "pickle for safetensors": ("digital", pickled(WEIGHTS), r"model\.safetensors: damaged"),
    "pickle": ("digital", pickled("pytorch_model.bin"), "nothing of it was run"),
    "pickle in a zip": ("digital", pickle_of_torch, "nothing of it was run"),
    "no weights": ("digital", lambda f: (f / WEIGHTS).unlink(), "no file named"),
    "wrong shape": ("digital", tensors(**{UP: lambda t: t[:100].clone()}), r"\(100, 128\)"),
    "vocab_size": ("digital", config(vocab_size=97), r"config.json asks for \(97, 128\)"),
    "hidden_size": ("digital", config(hidden_size=64), "config.json asks for"),
    "more layers": ("digital", config(num_hidden_layers=3), "lacks 9 weights"),
    "fewer layers": ("digital", config(num_hidden_layers=1), "9 weights of layers that config"),
    "fewer layers, simulated": ("optical", config(num_hidden_layers=1), "config.json describes"),
    "index a list": ("digital", index([1]), r"index\.json: got a list"),
    "index without a map": ("digital", index({}), "weight_map: expected an object"),
    "index of numbers": ("digital", index({"weight_map": {UP: 3}}), "weight_map: expected"),
    "index to /etc/passwd": ("digital", index({"weight_map": {UP: "/etc/passwd"}}), "outside the"),
    "index beyond the folder": ("digital", index_beyond, "outside the folder"),
    "index of another save": ("digital", index_of_another_save, "holds no more, which the index"),
    "index of no file": ("digital", index({"weight_map": {UP: "m.safetensors"}}), "m.*: missing"),
    "index no JSON": ("digital", text(INDEX, b"{"), r"index\.json:1: is no JSON"),
    "quantization a text": ("digital", config(quantization_config="aixsim"), "got 'aixsim'"),
    "quantization a list": ("digital", config(quantization_config=[1]), r"got \[1\]"),
    "quantization unknown": (
        "digital", config(quantization_config={"quant_method": "new"}), "got 'new'.*aixsim",
    ),
    "an unknown key": ("optical", quantization(version=2), "version: unknown key"),
    "a newer schema": ("optical", quantization(schema_version=2), "schema_version: got 2"),
    "transform a number": ("optical", quantization(transform=3), "transform: got 3"),
    "transform unknown": ("optical", quantization(transform={"transform": "x"}), "'x'"),
    "modules a text": ("optical", quantization(modules="many"), "modules: got 'many'"),
    "no positions": ("digital", config(max_position_embeddings=0), "max_position_emb.*: got 0"),
    "negative width": ("digital", config(hidden_size=-1), "hidden_size: got -1"),
    "width a text": ("digital", config(hidden_size="wide"), "hidden_size: got 'wide'"),
    "heads that do not fit": (
        "digital", config(num_attention_heads=3), r"size \(128\) is not a multiple of .*heads",
    ),
    "config no JSON": ("digital", text("config.json", b"{\n}}"), r"config\.json:2: is no JSON"),
    "config a list": ("digital", text("config.json", b"[]"), r"config\.json: got a list"),
    "config empty": ("digital", text("config.json", b""), r"config\.json:1: is no JSON"),
    "config of nothing": ("digital", text("config.json", b"{}"), r"config\.json: .*is empty"),
    "config binary": ("digital", text("config.json", b"\xff\xfe\x00"), "is not text in UTF-8"),
    "config too deep": ("digital", text("config.json", b"[" * 100_000), "config.json"),
    "model_type unknown": ("digital", config(model_type="x"), "cannot be loaded"),
    "generation_config no JSON": (
        "digital", text("generation_config.json", b"{"), r"generation_config\.json:1: is no JSON",
    ),
    "generation_config a list": (
        "digital", text("generation_config.json", b"[1]"), r"generation_config\.json: got a list",
    ),
    "transform.yaml broken": ("optical", plain_transform("a: [1\n"), r"transform\.yaml"),
    "transform.yaml a list": ("optical", plain_transform("- 1\n"), r"transform\.yaml"),
    "transform.safetensors empty": ("optical", plain_state, r"transform\.safetensors: damaged"),
    "integers": ("digital", tensors(**{UP: lambda t: t.to(torch.int32)}), "stored as I32"),
    "integers in a pickle": ("digital", integers_in_a_pickle, r"model\.bin: .*up_proj.*as int32"),
    "NaN": ("digital", tensors(**{UP: lambda t: t * NAN}), "65536 of 65536 numbers are NaN"),
    "infinite": ("optical", tensors(**{UP: lambda t: t / 0}), "are NaN or infinite"),
    "inverted ranges": ("optical", tensors(**{RANGES: lambda t: t.flip(1).contiguous()}), "lo <="),
    "NaN ranges": ("optical", tensors(**{RANGES: lambda t: t * NAN}), r"range \[nan, nan\]"),
    "plain ranges missing": (
        "optical", plain_ranges(lambda t: t.pop(RANGES)),
        rf"{STATE}: {RANGES}: got nothing; expected the shape",
    ),
    "plain ranges of more": (
        "optical", plain_ranges(lambda t: t.update(more=t[RANGES].clone())),
        rf"{STATE}: more: got the shape .*expected no such ranges",
    ),
    "plain ranges cut": (
        "optical", plain_ranges(lambda t: t.update({RANGES: t[RANGES][:1].clone()})),
        rf"{STATE}: {RANGES}: got the shape \(1, 2\); expected the shape",
    ),
    "ranges missing": ("optical", tensors_without(RANGES), "files lack model.layers.0.mlp.up_proj"),
    "eps infinite": ("digital", config(rms_norm_eps=1e999), r"config\.json: rms_norm_eps: got inf"),
    "theta NaN": ("digital", config(rope_theta=NAN), r"config\.json: rope_theta: got nan"),
    "a part's number": (
        "digital", config(rope_parameters={"rope_type": "default", "rope_theta": -1e999}),
        r"config\.json: rope_parameters: rope_theta: got -inf",
    ),
    "a list's number": ("digital", config(factors=[1.0, NAN]), r"config\.json: factors: got nan"),
    "temperature infinite": (
        "digital", generation(temperature=1e999), r"generation_config\.json: temperature: got inf",
    ),
    "temperature a word": (
        "digital", generation(temperature="hot"),
        r"generation_config\.json: temperature: got 'hot'; expected a number",
    ),
    "weights elsewhere": (
        "digital", config(transformers_weights="other.safetensors"),
        r"config\.json: transformers_weights: got 'other.safetensors'; expected none",
    ),
    "an adapter beside it": (
        "optical", text("adapter_config.json", b"{}"), r"adapter_config\.json: an adapter beside",
    ),
    "a bias that is denied": (
        "digital", tensors(**{"model.layers.0.self_attn.q_proj.bias": lambda _: torch.ones(16)}),
        r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which the model .* does not read",
    ),
    "scales that nobody reads": (
        "digital",
        tensors(**{"model.layers.0.self_attn.q_proj.weight_scale_inv": lambda _: torch.ones(1)}),
        r"holds model\.layers\.0\.self_attn\.q_proj\.weight_scale_inv",
    ),
    "half a range": ("optical", tensors(**{RANGES: lambda t: t.clamp(max=0) / 0}), "got the range"),
}  # fmt: skip
TOKENIZER = {
    "tokenizer.json broken": (text("tokenizer.json", b"{"), r"tokenizer\.json:1: is no JSON"),
    "tokenizer.json of nothing": (text("tokenizer.json", b"{}"), "tokenizer.*cannot be loaded"),
    "tokenizer_config.json": (text("tokenizer_config.json", b"[]"), r"config\.json: got a list"),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("token*")], "tokenizer .*: cannot be loaded",
    ),
}  # fmt: skip


@pytest.fixture
def copy(models, tmp_path):
    """A copy of a model without its manifest, as another program writes it."""

    def make(kind):
        folder = tmp_path / kind
        return shutil.copytree(models[kind], folder, ignore=shutil.ignore_patterns("manifest.json"))

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_folder_is_told(copy, case):
    kind, damage, said = CASES[case]
    folder = copy(kind)
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value) and "expected" in str(caught.value)
    for harmful in ("weights_only", "ignore_mismatched", "trust_remote_code", "can be ignored"):
        assert harmful not in str(caught.value)
    assert not (folder.parent / RUN).exists()


def test_the_planted_code_does_what_is_looked_for(tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(pickle.dumps(Code(tmp_path / "model"))), weights_only=True)
    assert not (tmp_path / RUN).exists()
    pickle.loads(pickle.dumps(Code(tmp_path / "model"))).close()
    assert (tmp_path / RUN).exists()


@pytest.mark.parametrize("case", ["bias", "bias without the model's prefix"])
def test_integers_for_any_parameter_are_refused(tmp_path, case):
    """Whatever it is called: transformers casts them without a word."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    model.save_pretrained(tmp_path)
    found, name = load_file(tmp_path / WEIGHTS), "transformer.h.0.mlp.c_fc.bias"
    # a buffer of old files, under a name like a weight's
    found["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(found, tmp_path / WEIGHTS, metadata={"format": "pt"})
    load_model(str(tmp_path))
    found[name] = found[name].to(torch.int64)
    if case != "bias":
        found = {key.removeprefix("transformer."): value for key, value in found.items()}
        name = name.removeprefix("transformer.")
    save_file(found, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{WEIGHTS}: {name}: is stored as I64"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("case", TOKENIZER)
def test_a_damaged_tokenizer_is_told(copy, case):
    damage, said = TOKENIZER[case]
    folder = copy("digital")
    damage(folder)
    with pytest.raises(UserError, match=said):
        load_for_eval(str(folder))


def test_a_base_models_file_has_no_prefix(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    made = LlamaConfig(
        **sizes, num_attention_heads=2, attention_bias=True, tie_word_embeddings=True
    )
    LlamaModel(made).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", attention_bias=False)
    with pytest.raises(UserError, match=r"holds layers\.0\.self_attn\.k_proj\.bias"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["digital", "optical"])
def test_what_is_not_damaged_loads(copy, kind):
    load_for_eval(str(copy(kind)))


@pytest.mark.parametrize("names", [("{f}",), ("{f}", "--no-transform"), ("{f}", "--json")])
def test_every_command_goes_through_the_same_door(copy, tmp_path, names):
    folder = copy("optical")
    cut(0.9)(folder)
    out = tmp_path / "out"
    for words in (
        ("eval", "ppl", *names),
        ("eval", "compare", *names),
        ("generate-hf", names[0], "--prompt", "x"),
        ("convert-ckpt", "aixsim", "debug", names[0], str(out)),
        ("continual-pretrain", "--model_name_or_path", names[0], "--dataset_name", "builtin",
         "--do_train", "--max_steps", "1", "--report_to", "none", "--output_dir", str(out)),
    ):  # fmt: skip
        done = CliRunner().invoke(app, [word.format(f=folder) for word in words])
        assert isinstance(done.exception, UserError), (words, done.exception)
        assert "model.safetensors: damaged" in str(done.exception)
        assert not (out / "config.json").exists()


def test_transforms_check_reads_the_config_alone(copy):
    folder = copy("optical")
    config(hidden_size=0)(folder)
    words = ["transforms", "check", "configs/transforms/optical.yaml", "--model", str(folder)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError) and "hidden_size: got 0" in str(done.exception)


def test_ranges_of_zeros_are_told(copy, caplog):
    folder = copy("optical")
    tensors(**{RANGES: torch.zeros_like})(folder)
    load_model(str(folder))
    assert "1 modules have a range from 0 to 0" in caplog.text


def test_bounds_may_be_infinite(copy):
    """As those of Mamba's time steps are."""
    folder = copy("digital")
    config(time_step_limit=[0.0, math.inf])(folder)
    load_model(str(folder))


@pytest.mark.parametrize("levels", [16, 256])
def test_ranges_of_other_hardware_are_kept_where_they_fit(copy, tmp_path, levels):
    """Of a plain folder as of one that is none."""
    folder = copy("optical")
    other = parse_transform({"layer_name_to_config": {"default": {"q_levels": levels}}}, source="t")
    found = ranges_of(load_model(str(folder), other))
    plain_ranges(lambda t: t.update({RANGES: t[RANGES][:1].clone()}))(folder)
    plain = ranges_of(load_model(str(folder), other))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in found if name != RANGES)
    assert plain[RANGES].isinf().all() and found[RANGES].isfinite().all()


def test_integer_buffers_are_none_of_our_business(copy):
    folder = copy("digital")
    found = load_file(folder / WEIGHTS)
    found["model.position_ids"] = torch.arange(64)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    load_model(str(folder))
