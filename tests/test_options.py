"""Options: one place for the command line, run.yaml and Python, and refusals that name the option."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hestia.curvature import CurvatureEstimator
from hestia.data.tokenizer import JoinerName
from hestia.errors import ConfigError
from hestia.mixed import KEPT
from hestia.options import PLANNING, Options, count, load_config
from hestia.pipeline.run import _meant
from hestia.recipes import GRIDS
from hestia.targets import HEAD_TYPES
from hestia.training.distillation import DIVERGENCES


def test_run_yaml_repeats_every_option_exactly(tmp_path: Path) -> None:
    made = Options(
        model="some/model",
        data=("a.txt", "b c.txt"),
        out="runs/1",
        target=("hf", "gguf:tq2_0"),
        options={"alpha": -0.4, "centred": True, "hold": None},
        steps=7,
        lr="3e-3",
        second_stage=0.5,
        fallback=True,
        skip=("model.layers.0.*",),
        separator="",
        seed=3,
    )
    path = tmp_path / "run.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    assert Options(**load_config(path)) == made
    assert set(load_config(path)) == {field.name for field in dataclasses.fields(Options)}


def test_run_yaml_leaves_out_what_a_plan_decided(tmp_path: Path) -> None:
    made = Options(model="m", plan="plan.json", plan_sha256="ab12", steps=7)
    path = tmp_path / "run.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    assert Options(**load_config(path)) == made
    left_out = {field.name for field in dataclasses.fields(Options)} - set(load_config(path))
    assert left_out == set(PLANNING)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"bits": 2.0}, "--bits"),
        ({"options": {"alpha": 0}}, "--option"),
        ({"target": ("gguf:q4_0",)}, "--target"),
        ({"max_kl": 0.1}, "--max-kl"),
        ({"recipe": "bitnet_ste", "skip": ("*",)}, "--recipe, --skip"),
    ],
)
def test_what_a_plan_has_decided_is_refused_beside_it(values: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--plan p.json has decided {flag}; leave it out"):
        Options(plan="p.json", **values)  # type: ignore[arg-type]


def test_every_option_has_a_help_text_that_names_real_defaults() -> None:
    assert all(field.metadata.get("help") for field in dataclasses.fields(Options))


def test_dashes_in_a_config_file_are_the_same_as_underscores(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("batch-size: 4\neval_tokens: 32k\nlr: 1e-3\ngroup-size: 64\n", encoding="utf-8")
    options = Options(**load_config(path))
    assert (options.batch_size, options.eval_tokens, options.learning_rate(), options.group()) == (4, "32k", 1e-3, 64)


def test_a_number_that_yaml_takes_for_text_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("weight_decay: 1e-2\nsecond_stage: 5E-1\n", encoding="utf-8")
    assert load_config(path) == {"weight_decay": "1e-2", "second_stage": "5E-1"}
    options = Options(**load_config(path))
    assert (options.weight_decay, options.second_stage) == (0.01, 0.5)


def test_an_unknown_key_is_refused_with_the_nearest_valid_name(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rat: 1\nbatchsize: 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown option 'learning_rat'"):
        load_config(path)
    path.write_text("batchsize: 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml: unknown option 'batchsize': did you mean 'batch_size'\?"):
        load_config(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "expected options as key: value, got list"),
        ("a: [1\n", "not readable as YAML"),
        ("seed: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
        ("", "expected options"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        load_config(path)
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"text_column": ""}, "--text-column"),
        ({"lr": "fast"}, "--lr"),
        ({"lr": "0"}, "--lr"),
        ({"lr": "-1e-3"}, "--lr"),
        ({"lr": "nan"}, "--lr"),
        ({"tokens": "many"}, "--tokens"),
        ({"tokens": "0"}, "--tokens"),
        ({"tokens": "inf"}, "--tokens"),
        ({"tokens": "2MM"}, "--tokens"),
        ({"eval_tokens": "-1"}, "--eval-tokens"),
        ({"steps": 0}, "--steps"),
        ({"batch_size": -1}, "--batch-size"),
        ({"seq_len": 0}, "--seq-len"),
        ({"accumulation": 0}, "--accumulation"),
        ({"calibrate": 1}, "--calibrate"),
        ({"calibrate": -2}, "--calibrate"),
        ({"held_out_share": 1.0}, "--held-out-share"),
        ({"held_out_share": float("nan")}, "--held-out-share"),
        ({"group_size": "0"}, "--group-size"),
        ({"group_size": "rows"}, "--group-size"),
        ({"group_size": "-64"}, "--group-size"),
        ({"embeddings": "trian"}, "did you mean 'train'"),
        ({"precision": "fp16"}, "--precision"),
        ({"device": "cdua"}, "did you mean 'cuda'"),
        ({"joiner": "box"}, "did you mean 'bos'"),
        ({"seed": "x"}, "--seed wants a int"),
        ({"seed": True}, "--seed"),
        ({"seed": 1.5}, "--seed"),
        ({"compile": "yes"}, "--compile"),
        ({"data": {"file": "a.txt"}}, "--data wants one value or a list of them"),
        ({"skip": [True]}, "--skip wants one value or a list of them"),
        ({"options": ["alpha=1"]}, "--option"),
        ({"held_out_share": 0.5}, "--held-out-share"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"clip": float("nan")}, "--clip"),
        ({"clip": -1.0}, "--clip"),
        ({"plan_sha256": "ab12"}, "--plan-sha256 is the digest of a --plan"),
        ({"clip": "one"}, "--clip wants a float, got 'one'"),
        ({"clip": "nan"}, "--clip"),
    ],
)
def test_a_bad_value_is_refused_and_its_option_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Options(**values)  # type: ignore[arg-type]


def test_numbers_in_a_list_are_read_as_people_write_them_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("widths: [1.58, 2, 16]\ndata: a.txt\n", encoding="utf-8")
    made = Options(**load_config(path))
    assert made.widths == ("1.58", "2", "16") and made.mix() == (1.58, 2.0, 16.0)
    assert made.data == ("a.txt",)


@given(st.integers(1, 10**12), st.sampled_from(["", "_", ","]))
def test_a_count_written_out_is_read_back(value: int, mark: str) -> None:
    text = f"{value:_}".replace("_", mark) if mark else str(value)
    assert count(text, "tokens") == value


@given(st.text(max_size=12))
def test_no_text_breaks_the_reader_of_counts(text: str) -> None:
    try:
        assert count(text, "tokens") >= 1
    except ConfigError as error:
        assert "--tokens" in str(error)


def test_options_cannot_be_changed_and_yaml_holds_no_python_objects() -> None:
    options = Options(options={"alpha": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]
    assert yaml.safe_load(options.to_yaml())["options"] == {"alpha": 1}


def test_choices_are_those_of_the_parts_they_choose() -> None:
    """``hestia.options`` imports none of them, so that ``--help`` is quick."""

    def taken(name: str, values: Iterable[object], **more: object) -> None:
        for value in values:
            Options(model="m", **{name: value}, **more)  # type: ignore[arg-type]

    taken("head", HEAD_TYPES)
    taken("joiner", get_args(JoinerName))
    taken("distill", DIVERGENCES)
    widths = [f"{width:g}" for width in (*GRIDS, KEPT)]
    assert Options(model="m", widths=tuple(widths)).mix() == (*GRIDS, KEPT)
    listed = str(next(f for f in dataclasses.fields(Options) if f.name == "estimator").metadata["help"])
    ours = {
        name
        for name, kind in CurvatureEstimator._registry[CurvatureEstimator.family].items()
        if kind.__module__.startswith("hestia.")  # other tests register theirs
    }
    assert set(listed.partition(": ")[2].split(", ")) == ours


def test_one_run_s_paths_are_the_same_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sensitivity", "plan"):
        Path(f"{name}.json").touch()
        ways = [f"{name}.json", f"./{name}.json", str(tmp_path / f"{name}.json")]
        assert len({_meant(Options(model="m", **{name: way}), name) for way in ways}) == 1  # type: ignore[arg-type]


def test_a_numpy_number_among_the_recipes_options_is_written_as_a_number() -> None:
    made = Options(model="m", options={"temperature": np.float64(0.25)})
    assert type(made.options["temperature"]) is float
    assert yaml.safe_load(made.to_yaml())["options"] == {"temperature": 0.25}
