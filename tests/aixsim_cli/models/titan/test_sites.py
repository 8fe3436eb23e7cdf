"""torchtitan's names and Hugging Face's, both ways, for weights, ranges and sites."""

import pytest
import torch

from aixsim_cli.models.names import PAIRS, hf_name, titan_name
from aixsim_cli.models.titan.model import meta_model, model_args
from aixsim_cli.models.titan.sites import StateDictAdapter, titan_sites

ARGS = model_args("aixsim", "debug", 64)


@pytest.mark.parametrize(
    ("titan", "hf"),
    [
        ("layers.0.attention.wq", "model.layers.0.self_attn.q_proj"),
        ("layers.11.feed_forward.w2.ranges", "model.layers.11.mlp.down_proj.ranges"),
        (
            "layers.3.attention.inner_attention.ranges",
            "model.layers.3.self_attn.inner_attention.ranges",
        ),
        ("output", "lm_head"),
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
    ],
)
def test_names_both_ways(titan, hf):
    assert hf_name(titan) == hf
    assert titan_name(hf) == titan


def test_the_table_is_torchtitans_own():
    theirs = {
        titan.removesuffix(".weight"): hf.removesuffix(".weight")
        for hf, titan in StateDictAdapter(ARGS).from_hf_map.items()
        if titan is not None
    }
    assert theirs == {key: name for key, name in PAIRS.items() if key != "layers.{}.attention"}


def test_unknown_name():
    with pytest.raises(KeyError):
        hf_name("layers.0.mystery")


def test_sites_of_a_model():
    sites = titan_sites(meta_model(ARGS))
    kinds = [site.kind for site in sites]
    assert kinds.count("linear") == ARGS.n_layers * 7 + 1
    assert kinds.count("attention") == ARGS.n_layers
    assert [site.name for site in sites if site.is_head] == ["output"]


def test_state_dict_round_trip_carries_ranges():
    model = meta_model(ARGS)
    state = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    state["layers.0.attention.wk.ranges"] = torch.randn(3, 2)
    adapter = StateDictAdapter(ARGS)
    hf = adapter.to_hf(state)
    assert torch.equal(
        hf["model.layers.0.self_attn.k_proj.ranges"], state["layers.0.attention.wk.ranges"]
    )
    back = adapter.from_hf(hf)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
