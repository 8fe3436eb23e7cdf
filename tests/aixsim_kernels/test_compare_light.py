"""Loss against light: what is read of sweeps, and the mathematics of the tables."""

import json
import math

import numpy as np
import pytest

from aixsim_cli.energy.account import light_per_token
from aixsim_cli.energy.shape import shape_of_flavor
from aixsim_cli.transforms.read import parse_transform

LIGHT = "photons_per_mac"
LIGHTS = (0.3, 1.0, 3.0, 10.0)
WIDTHS = {"debug-64": 64, "debug": 128, "debug-256": 256}
PARAMS = {"q_levels": 256, "q_smooth_factor": [0.0, 0.9]}
TRANSFORM = {"transform": "optical", "layer_name_to_config": {"default": PARAMS}}
KINDS = {"wq": 0.01, "wk": 0.02, "wv": 0.04, "wo": 0.01, "w1": 0.02, "w2": 0.03, "w3": 0.02,
         "attention": 0.05}  # fmt: skip


@pytest.fixture
def curves(script):
    return script("light_curves")


@pytest.fixture
def compare(script):
    return script("compare_light")


@pytest.fixture
def write(tmp_path):
    """A folder as `aixsim eval sweep` leaves it, of a loss of 4 + cost / photons."""

    def folder(name, cost, *, key=LIGHT, text="text", repeats=2, lights=LIGHTS):
        path = tmp_path / "sweeps" / name
        path.mkdir(parents=True)
        identity = {"transform": TRANSFORM, "text (by its tokens)": text}
        (path / "sweep.json").write_text(json.dumps(identity))
        rows = [(None, 0, 0.0)]
        rows += [({}, seed, 0.01) for seed in range(repeats)]
        rows += [({key: x}, seed, 0.01 + cost / x) for x in lights for seed in range(repeats)]
        with (path / "losses.jsonl").open("w") as file:
            for values, seed, above in rows:
                # the windows lose unequally, by more than one of them has to lose
                windows = [256 * (4 + above * share) for share in (0.5, 0.8, 1.2, 1.5)]
                row = {"values": values, "repeat": seed, "tokens": 1024, "nll": 4 + above}
                file.write(json.dumps(row | {"windows": windows}) + "\n")
        return path.parent

    return folder


@pytest.fixture
def widths(write):
    """Photons at a loss fall as 1 / d: the cost does."""
    for flavor, width in WIDTHS.items():
        for seed in (1, 2):
            folder = write(f"{flavor}-{seed}", 6.0 / width)
    return folder


def test_a_crossing_of_a_power_law_is_exact(curves):
    photons = np.array([0.1, 1.0, 10.0])
    assert curves.crossing(photons, 0.08 / photons, 0.04) == pytest.approx(2.0)
    assert curves.crossing(photons, 0.8 / photons**0.5, 0.4) == pytest.approx(4.0)


def test_a_crossing_is_where_a_loss_stays_below(curves):
    photons = np.array([1.0, 2.0, 4.0, 8.0])
    found = curves.crossing(photons, np.array([0.03, 0.05, 0.05, 0.03]), 0.04)
    assert 4 < found < 8


def test_what_is_below_nothing_is_crossed_too(curves):
    found = curves.crossing(np.array([1.0, 100.0]), np.array([0.08, -0.08]), 0.0 + 1e-12)
    assert found == pytest.approx(10.0)


@pytest.mark.parametrize("target", [0.001, 0.5])
def test_nothing_is_extrapolated(curves, target):
    photons = np.array([0.3, 1.0, 10.0])
    assert curves.crossing(photons, 0.1 / photons, target) is None


def test_a_loss_that_is_no_number_is_not_below_a_target(curves):
    photons = np.array([1.0, 10.0, 100.0])
    assert curves.crossing(photons, np.array([1.0, 0.01, math.nan]), 0.1) is None


def test_a_slope_is_that_of_least_squares(curves):
    random = np.random.default_rng(1)
    x, y = random.normal(size=(3, 9)), random.normal(size=(3, 9))
    expected = [np.polyfit(a, b, 1)[0] for a, b in zip(x, y, strict=True)]
    assert curves.slope(x, y) == pytest.approx(expected)


def test_the_law_of_the_widths_is_found(curves, compare, widths):
    found = curves.read_sweeps(widths)
    assert [s.width for s in found] == [128, 128, 256, 256, 64, 64]
    # c / rho = 0.04 of c = 6 / d
    assert curves.light_at(found[0], "+0.04 nats") == pytest.approx(6 / 128 / 0.04)
    assert curves.light_at(found[0], "+1 %") == pytest.approx(6 / 128 / 0.0401)
    assert compare.fit_of(found, "+0.04 nats") == pytest.approx(-1)


def test_trainings_that_agree_leave_no_doubt(curves, widths):
    found = curves.read_sweeps(widths)
    slopes = curves.resampled_slopes(found, "+0.04 nats", seeds=True, windows=False, draws=50)
    assert slopes == pytest.approx(np.full(50, -1.0))


def test_windows_that_lose_alike_at_every_width_leave_no_doubt(curves, widths):
    found = curves.read_sweeps(widths)
    slopes = curves.resampled_slopes(found, "+0.04 nats", seeds=False, windows=True, draws=50)
    # some draws lose so much, or so little, that the points do not enclose the target
    assert 20 < len(slopes) <= 50
    assert slopes == pytest.approx(np.full(len(slopes), -1.0))


def test_trainings_that_differ_spread_the_slope(curves, write):
    for flavor, width in WIDTHS.items():
        for seed, factor in ((1, 1.0), (2, 1.3), (3, 1.5)):
            folder = write(f"{flavor}-{seed}", factor * 6.0 / width)
    found = curves.read_sweeps(folder)
    drawn = [curves.resampled_slopes(found, "+0.04 nats", seeds=True, windows=False)
             for _ in range(2)]  # fmt: skip
    assert (drawn[0] == drawn[1]).all()
    # of a width's mean: deviation over three, of three; the ends of the fit are log 4 apart
    deviation = np.log([1.0, 1.3, 1.5]).std() / math.sqrt(3)
    assert drawn[0].std() == pytest.approx(math.sqrt(2) * deviation / math.log(4), rel=0.1)


def test_what_is_still_written_is_left_out(curves, write):
    folder = write("debug-1", 0.05)
    path = folder / "debug-1" / "losses.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    # the last point lacks a noise seed, whose line has no end yet
    path.write_text("".join(lines[:-1]) + lines[-1][:50])
    (sweep,) = curves.read_sweeps(folder)
    assert list(sweep.photons) == list(LIGHTS[:-1])
    assert path.read_text().endswith(lines[-1][:50])


def test_a_sweep_without_a_point_is_left_out(curves, write):
    assert curves.read_sweeps(write("debug-1", 0.05, lights=())) == []


def test_names_tell_what_a_sweep_is(curves, write):
    for name in ("kind-wq-3", "kind-attention-debug-64-1", "offset-debug-2", "light-debug-256-1"):
        folder = write(name, 0.05, key="photons_per_mac@.*wq" if "wq" in name else LIGHT)
    (folder / "log.123").write_text("")
    (folder / "another").mkdir()
    found = {s.name: (s.role, s.kind, s.flavor, s.seed) for s in curves.read_sweeps(folder)}
    assert found == {
        "kind-wq-3": ("kind", "wq", "debug", 3),
        "kind-attention-debug-64-1": ("kind", "attention", "debug-64", 1),
        "offset-debug-2": ("offset", "", "debug", 2),
        "light-debug-256-1": ("light", "", "debug-256", 1),
    }


def test_sweeps_of_two_texts_are_refused(curves, write):
    write("debug-1", 0.05)
    with pytest.raises(ValueError, match="several texts"):
        curves.read_sweeps(write("debug-2", 0.05, text="another"))


def test_what_much_light_tends_to_is_the_reference_where_it_was_measured(curves, write):
    write("debug-1", 0.05)
    write("linears-debug-1", 0.05)
    write("debug-2", 0.05)
    folder = write("limit-debug-1", -4e5, lights=(1e8,))
    found = {s.name: s for s in curves.read_sweeps(folder)}
    # 0.01 above digital the transform unchanged, and 4e-3 below that the limit
    assert found["debug-1"].own.mean() == pytest.approx(4.006)
    assert found["debug-1"].above == pytest.approx(0.004 + 0.05 / np.array(LIGHTS))
    # part of whose detectors keep their uniform noise; and one of another training
    assert found["linears-debug-1"].own.mean() == pytest.approx(4.01)
    assert found["debug-2"].own.mean() == pytest.approx(4.01)


def test_light_of_its_own_is_no_reference(curves, write):
    folder = write("debug-1", 0.05)
    path = folder / "debug-1" / "sweep.json"
    path.write_text(path.read_text().replace('"q_levels": 256', '"photons_per_mac": 1.0'))
    with pytest.raises(ValueError, match="expected light-FLAVOR-SEED"):
        curves.read_sweeps(folder)
    (folder / "debug-1").rename(folder / "light-debug-1")
    assert len(curves.read_sweeps(folder)) == 1


def test_the_multiplications_are_those_that_light_is_counted_for(curves):
    shape = shape_of_flavor("aixsim", "debug", 4096)
    layers = {"default": {"photons_per_mac": 1.0}}
    optical = parse_transform({"layer_name_to_config": layers}, source="test")
    macs = curves.macs_of(shape, 256)
    assert set(macs) == set(KINDS)
    light = light_per_token(shape, optical, seq_len=256)
    assert sum(macs.values()) == pytest.approx(sum(light.values()))


def test_no_other_budget_of_as_much_light_is_better(curves):
    costs, macs = {"a": 0.03, "b": 0.01, "c": 0.002}, {"a": 10.0, "b": 500.0, "c": 90.0}

    def lost(budget):
        return sum(cost / budget[kind] for kind, cost in costs.items())

    best = curves.best_budget(costs, macs, 1200.0)
    assert sum(best[kind] * macs[kind] for kind in macs) == pytest.approx(1200.0)
    random = np.random.default_rng(2)
    for _ in range(200):
        other = {kind: rho * random.uniform(0.5, 2) for kind, rho in best.items()}
        scale = 1200.0 / sum(other[kind] * macs[kind] for kind in macs)
        assert lost({kind: rho * scale for kind, rho in other.items()}) >= lost(best)


def test_a_cost_by_multiplications_is_a_uniform_budget(curves):
    macs = {"a": 10.0, "b": 500.0}
    best = curves.best_budget({"a": 0.01, "b": 0.5}, macs, 2 * 510.0)
    assert best == pytest.approx({"a": 2.0, "b": 2.0})


def test_the_budgets_file_takes_as_much_light_and_its_gain_is_told(
    curves, compare, write, tmp_path, capsys
):
    for kind, cost in KINDS.items():
        folder = write(f"kind-{kind}-1", cost, key=f"photons_per_mac@.*{kind}")
    write("debug-1", sum(KINDS.values()))
    path = tmp_path / "budget.yaml"
    compare.main(folder, path, 2.0)
    assert "*" not in path.read_text().replace(".*", "")
    from aixsim_cli.transforms.read import read_transform

    shape = shape_of_flavor("aixsim", "debug", 4096)
    macs = curves.macs_of(shape, 256)
    light = light_per_token(shape, read_transform(path), seq_len=256)
    # numbers of the file have four digits
    assert sum(light.values()) == pytest.approx(2 * sum(macs.values()), rel=1e-3)
    root = sum(math.sqrt(KINDS[kind] * macs[kind]) for kind in macs)
    saved = 1 - root**2 / (sum(KINDS.values()) * sum(macs.values()))
    assert 0.01 < saved < 1
    assert f"{100 * saved:.1f} % less" in capsys.readouterr().out


def test_a_budget_of_some_kinds_is_not_written(compare, write, tmp_path):
    import typer

    with pytest.raises(typer.BadParameter, match="w1, w2, w3"):
        compare.main(write("kind-wq-1", 0.05), tmp_path / "budget.yaml", 1.0)
    assert not (tmp_path / "budget.yaml").exists()


def test_a_transform_that_names_layers_is_not_written_over(compare):
    layers = {"output": None, "default": {}}
    with pytest.raises(ValueError, match="output"):
        compare.with_light({"layer_name_to_config": layers}, {"wq": 1.0})


def test_tables_say_what_is_missing(compare, widths, capsys):
    compare.main(widths, None, 1.0)
    said = capsys.readouterr().out
    for folder in ("offset-FLAVOR-SEED", "light-FLAVOR-SEED", "kind-K-SEED"):
        assert f"missing: {folder}" in said


def test_ratios_are_of_the_same_model_and_training_at_equal_loss(compare, write, capsys):
    # the other training has no partner
    for name, cost in (("debug-1", 0.1), ("offset-debug-1", 0.3), ("offset-debug-2", 0.3),
                       ("light-debug-1", 0.05)):  # fmt: skip
        folder = write(name, cost)
    compare.main(folder, None, 1.0)
    said = capsys.readouterr().out
    assert "| +0.04 nats | 128 | 1 | 2.50 | 7.50 | 3.00 |" in said
    assert "| +0.04 nats | 128 | 1 | 2.50 | 1.25 | 0.500 |" in said
    assert "| 128 | 2 |" not in said


def test_every_picture_is_drawn_or_named(script, widths, write, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = script("plot_light")
    for flavor, width in WIDTHS.items():
        write(f"linears-{flavor}-1", 5.0 / width)
    plot.main(tmp_path / "pictures", widths)
    names = {"light-loss", "light-width", "light-energy", "energy-parts", "energy-width"}
    made = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert made == {f"{name}{suffix}" for name in names for suffix in (".pdf", ".png")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    capsys.readouterr()
    plot.main(tmp_path / "pictures", widths, tmp_path / "run")
    assert "light-layers: left out" in capsys.readouterr().out


def test_the_signal_is_told_by_the_names_of_a_transforms_patterns(script):
    pytest.importorskip("matplotlib")
    records = [{"loss": 1.0, "snr/q_proj": 2.0, "snr/attention": 5.0},
               {"loss": 1.0, "snr/q_proj": 4.0, "snr/attention": 5.0}]  # fmt: skip
    found = script("plot_light").snr_of(records)
    assert found == {"wq": (3.0, pytest.approx(math.sqrt(2))), "attention": (5.0, 0.0)}
