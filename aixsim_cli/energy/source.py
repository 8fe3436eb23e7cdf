"""The shape of a model that is there, by its config: no weight is read."""

from pathlib import Path
from typing import Any

from aixsim_cli.config.flavors import FLAVORS, model_vocab_size
from aixsim_cli.config.recipe import RECIPE
from aixsim_cli.data.tokenizer import vocab_size as tokenizer_size
from aixsim_cli.energy.shape import (
    Attention,
    Linear,
    Place,
    Shape,
    other_ops,
    shape_of_flavor,
)
from aixsim_cli.errors import UserError, closest
from aixsim_cli.models.kind import SourceKind, find_source
from aixsim_cli.transforms.choice import KEEP_OWN, Choice
from aixsim_cli.transforms.config import TransformConfig


def find_shape(
    name: str, choice: Choice, *, vocab_size: int | None = None, trust_remote_code: bool = False
) -> tuple[Shape, TransformConfig | None]:
    """The shape of a flavor or of a model, and the transform that it is used with.

    Args:
        name: "60M", "llama3/8B", or a source: checkpoint, Hugging Face folder, hub name.
        choice: of the transform; a flavor has none of its own.
        vocab_size: of a flavor's tokenizer; None = that of the recipe's. A llama3 flavor and a
            model have their own.
        trust_remote_code: run Python code that a model brings.

    Raises:
        UserError: there is no such flavor or model, or its config cannot be used.
    """
    arch, _, flavor = name.rpartition("/")
    arch, is_there = arch or "aixsim", Path(name).exists()
    given = choice if isinstance(choice, TransformConfig) else None
    is_flavor = flavor in FLAVORS.get(arch, {}) and not is_there
    if vocab_size is not None and not (is_flavor and arch == "aixsim"):
        raise UserError(f"--vocab-size: got {vocab_size}; {name} has its own: expected none")
    if is_flavor:
        # a llama3 flavor is asked for without a tokenizer
        tokens = vocab_size or tokenizer_size(RECIPE.model.hf_assets_path) * (arch == "aixsim")
        return shape_of_flavor(arch, flavor, model_vocab_size(arch, flavor, tokens)), given
    meant = closest(name, [*FLAVORS["aixsim"], *(f"llama3/{size}" for size in FLAVORS["llama3"])])
    if meant is not None and not is_there:
        raise UserError(f"{name}: no flavor and no folder; did you mean '{meant}'?")
    shape, own = shape_of_source(name, choice, trust_remote_code=trust_remote_code)
    return shape, own if choice is KEEP_OWN else given


def shape_of_source(
    source: str, choice: Choice = KEEP_OWN, *, trust_remote_code: bool = False
) -> tuple[Shape, TransformConfig | None]:
    """The shape of a model, and its own transform where it is asked for.

    Args:
        source: torchtitan checkpoint, Hugging Face folder or hub name.
        choice: its own transform is read where it is kept.
        trust_remote_code: run Python code that the model brings.

    Returns:
        The shape; the transform that the model was saved with, None = digital, or not asked for.

    Raises:
        UserError: the config cannot be used.
    """
    if find_source(source) is SourceKind.TITAN:
        return _of_titan(Path(source), choice)
    from aixsim_cli.models.preview import meta_model_of

    trust = trust_remote_code
    own = _own_transform(source, trust_remote_code=trust) if choice is KEEP_OWN else None
    return _of_transformers(source, meta_model_of(source, trust_remote_code=trust)), own


def _own_transform(source: str, *, trust_remote_code: bool) -> TransformConfig | None:
    """Of a Hugging Face model, in whichever form it was saved."""
    from aixsim_cli.models.hf.config import METHOD, AixsimConfig
    from aixsim_cli.models.hf.saved import TRANSFORM_FILE, load_config
    from aixsim_cli.transforms.read import read_transform

    beside = Path(source) / TRANSFORM_FILE
    if beside.is_file():
        return read_transform(beside, saved=True)
    config = load_config(source, trust_remote_code=trust_remote_code)
    section = getattr(config, "quantization_config", None) or {}
    if section.get("quant_method") != METHOD:
        return None
    saved: Any = AixsimConfig.from_dict(section)
    return saved.transform_config


def _of_titan(folder: Path, choice: Choice) -> tuple[Shape, TransformConfig | None]:
    from aixsim_cli.config.pretrain import CONFIG_FILE, load_config
    from aixsim_cli.models.titan.storage import CheckpointReader
    from aixsim_cli.transforms.choice import DIGITAL

    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: has no config.yaml that names its flavor; convert it with "
            "aixsim convert-ckpt first"
        )
    config = load_config(path) if choice is KEEP_OWN else load_config(path, transform=DIGITAL)
    metadata: Any = CheckpointReader(folder).read_metadata().state_dict_metadata
    if "tok_embeddings.weight" not in metadata:
        raise UserError(f"{folder}: holds no model (no tok_embeddings.weight)")
    rows = metadata["tok_embeddings.weight"].size[0]
    shape = shape_of_flavor(config.model.name, config.model.flavor, rows)
    return shape, config.transform_config


def _of_transformers(source: str, model: Any) -> Shape:
    """By its modules; an attention by the numbers of the config."""
    from aixsim_cli.models.hf.sites import hf_sites, out_of_reach

    config = model.config.get_text_config()
    if unsaid := [key for key in ("hidden_size", "num_hidden_layers") if not hasattr(config, key)]:
        raise UserError(f"{source}/config.json: {', '.join(unsaid)}: missing; expected its sizes")
    dim, heads = config.hidden_size, getattr(config, "num_attention_heads", 0)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or (dim // heads if heads else 0)
    places: list[Place] = []
    for site in hf_sites(model):
        if site.kind == "attention":
            places.append(Attention(heads, kv_heads, head_dim, site))
            continue
        weight = model.get_submodule(site.name).weight
        # transformers' Conv1D holds its weight the other way round
        transposed = type(model.get_submodule(site.name)).__name__ == "Conv1D"
        k, n = weight.shape if transposed else weight.shape[::-1]
        kind = "output" if site.is_head else site.names[-1].rpartition(".")[2]
        places.append(Linear(kind, k, n, site))
    others = out_of_reach(model)
    unreached = [name for name, kind in others.items() if kind.split(" ")[0].endswith("Attention")]
    places += [Attention(heads, kv_heads, head_dim, None) for _ in unreached]
    missing = [name for name in others if name not in unreached]
    notes = (f"not counted: {', '.join(missing[:3])}, {len(missing)} modules out of reach",)
    gated = any(isinstance(p, Linear) and p.kind in ("w3", "up_proj") for p in places)
    rotary = any(hasattr(config, key) for key in ("rope_parameters", "rope_theta"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # a budget counts the output projection, whether or not it is the embedding
    tied = head is not None and head.weight is embedding.weight
    table = 0 if tied else embedding.weight.numel()
    return Shape(
        source,
        tuple(places),
        parameters=sum(p.numel() for p in model.parameters()) - table,
        ops=other_ops(
            dim=dim,
            layers=config.num_hidden_layers,
            heads=(heads + kv_heads) * head_dim,
            ffn=getattr(config, "intermediate_size", None) or 4 * dim,
            gated=gated,
            rotary=rotary,
        ),
        notes=notes if missing else (),
    )
