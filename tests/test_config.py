from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dept_fl.config import (
    CONF_DIR,
    Recipe,
    SiloConfig,
    SourceConfig,
    differences,
    home_dir,
    load_recipe,
    recipe_from_json,
    require_silos,
)
from dept_fl.errors import ConfigError, DeptError

RecipeOf = Callable[..., Recipe]

# What names an open model is tried with one, by tests/test_start.py.
RECIPES = [file for file in sorted(CONF_DIR.glob("*.yaml")) if file.stem != "continue"]
PRESETS = sorted(p.stem for p in (CONF_DIR / "models").glob("*.yaml"))

MODEL = "model: {config: {model_type: llama}}\n"
SILO = "silos: {ant: {files: [ant.txt]}}\n"


def problems(path: Path, overrides: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


# ---- what loads --------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_that_comes_along_loads(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.model.config["model_type"]
    assert bool(recipe.silos) == (file.stem != "partners")  # whose silos have files of their own


def test_there_are_recipes_and_presets_to_try() -> None:
    assert "demo" in [p.stem for p in RECIPES]
    assert {"gpt2-125m", "mpt-125m", "llama-tiny"} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_is_written_out(tmp_path: Path, preset: str) -> None:
    file = written(tmp_path, f"model: {{preset: {preset}}}\n{SILO}")
    model = load_recipe(file).model
    assert model.preset == ""
    assert model.config["model_type"] == preset.split("-")[0]


def test_own_settings_go_over_the_presets(tmp_path: Path) -> None:
    file = written(tmp_path, f"model: {{preset: llama-tiny, config: {{hidden_size: 64}}}}\n{SILO}")
    config = load_recipe(file).model.config
    assert (config["hidden_size"], config["num_hidden_layers"]) == (64, 4)


def test_a_mapping_within_a_preset_keeps_what_is_not_overridden(tmp_path: Path) -> None:
    file = written(tmp_path, f"model: {{preset: mpt-125m}}\n{SILO}")
    config = load_recipe(file, "model.config.attn_config.attn_pdrop=0.1").model.config
    assert config["attn_config"] == {"alibi": True, "attn_pdrop": 0.1}


def test_a_preset_may_be_a_file_beside_the_recipe(tmp_path: Path) -> None:
    written(tmp_path, "model_type: gpt2\nn_layer: 3\n", "own.yaml")
    file = written(tmp_path, f"model: {{preset: own.yaml}}\n{SILO}")
    assert load_recipe(file).model.config == {"model_type": "gpt2", "n_layer": 3}


OVERRIDES = [
    ("rounds=7", lambda r: r.rounds, 7),
    ("rounds=7 rounds=8", lambda r: r.rounds, 8),
    ("inner.local_steps=8", lambda r: r.inner.local_steps, 8),
    ("'inner={local_steps: 8, batch_size: 2}'", lambda r: r.inner.local_steps, 8),
    ("inner.learning_rate=3e-4", lambda r: r.inner.learning_rate, 3e-4),
    ("inner.learning_rate=1", lambda r: r.inner.learning_rate, 1.0),
    ("inner.betas=[0.9,0.99]", lambda r: r.inner.betas, [0.9, 0.99]),
    ("'inner.betas=[0.9, 0.99]'", lambda r: r.inner.betas, [0.9, 0.99]),
    ("only=[ant]", lambda r: r.silo_names, ["ant"]),
    ("only=[cat,ant]", lambda r: r.silo_names, ["ant", "cat"]),
    ("only=[]", lambda r: r.silo_names, ["ant", "bee", "cat"]),
    ("without=[bee]", lambda r: r.silo_names, ["ant", "cat"]),
    ("only=[bee,cat] without=[bee]", lambda r: r.silo_names, ["cat"]),
    ("share_samples=null", lambda r: r.share_samples, None),
    ("share_samples=true", lambda r: r.share_samples, True),
    ("deduplicate=false", lambda r: r.deduplicate, False),
    ("outer.optimizer=nesterov outer.momentum=0.5", lambda r: r.outer.momentum, 0.5),
    ("outer.learning_rate=null", lambda r: r.outer.learning_rate, None),
    ("name='two words'", lambda r: r.name, "two words"),
    ('name="two words"', lambda r: r.name, "two words"),
    ("'name=two words'", lambda r: r.name, "two words"),
    ("'name=a: b'", lambda r: r.name, "a: b"),
    ("name=a=b", lambda r: r.name, "a=b"),
    ("name=12", lambda r: r.name, "12"),
    ("name=наука", lambda r: r.name, "наука"),
    ("name=${seed}", lambda r: r.name, "3"),
    ("model.config.hidden_size=48", lambda r: r.model.config["hidden_size"], 48),
    (
        "model.config.rope_scaling.factor=2.0",
        lambda r: r.model.config["rope_scaling"],
        {"factor": 2.0},
    ),
    ("'model.config={hidden_size: 48}'", lambda r: r.model.config["model_type"], "llama"),
    ("shared_tokenizer=", lambda r: r.shared_tokenizer, ""),
    (
        "tokenizer=shared shared_tokenizer=gpt2 shared_tokenizer=",
        lambda r: r.shared_tokenizer,
        "",
    ),
    ("tokenizer=shared variant=trim", lambda r: r.label, "trim"),
    ("tokenizer=shared shared_tokenizer=org/name", lambda r: r.shared_tokenizer, "org/name"),
    ("", lambda r: r.label, "spec-opt"),
    ("model.config={} model.preset=gpt2-125m", lambda r: r.model.config["model_type"], "gpt2"),
]


@pytest.mark.parametrize(
    ("overrides", "value", "expected"), OVERRIDES, ids=[o[0] for o in OVERRIDES]
)
def test_an_override_sets_its_value(
    recipe: RecipeOf, overrides: str, value: Callable[[Recipe], object], expected: object
) -> None:
    found = value(recipe(overrides))
    assert found == expected
    assert type(found) is type(expected)


def test_an_override_of_a_silo_keeps_the_rest_of_it(recipe: RecipeOf) -> None:
    before, after = recipe().silos, recipe("silos.ant.max_bytes=10").silos
    assert after == {**before, "ant": replace(before["ant"], max_bytes=10)}


@pytest.mark.parametrize("override", ["silos.new.files=[x.txt]", "'silos.new={files: [x.txt]}'"])
def test_an_override_adds_a_silo(recipe: RecipeOf, tiny_file: Path, override: str) -> None:
    added = recipe(override)
    assert added.silo_names == ["ant", "bee", "cat", "new"]
    assert added.silos["new"] == SiloConfig(files=[str(tiny_file.parent / "x.txt")])


@pytest.mark.parametrize(
    "override",
    [
        "silos.new.sources.web.files=[x.txt] silos.new.sources.web.weight=2",
        "'silos.new={sources: {web: {files: [x.txt], weight: 2}}}'",
    ],
)
def test_a_silo_of_sources_is_read_with_their_paths(
    recipe: RecipeOf, tiny_file: Path, override: str
) -> None:
    web = SourceConfig(files=[str(tiny_file.parent / "x.txt")], weight=2.0)
    made = recipe(override)
    assert made.silos["new"] == SiloConfig(sources={"web": web})
    assert recipe_from_json(made.to_json()) == made
    emptied = f"{override} silos.new.sources={{}} silos.new.files=[y.txt]"
    assert recipe(emptied).silos["new"] == SiloConfig(files=[str(tiny_file.parent / "y.txt")])


def test_silos_may_be_emptied_and_named_anew(recipe: RecipeOf) -> None:
    assert recipe("silos={} silos.new.files=[x.txt]").silo_names == ["new"]


def test_a_yaml_comment_an_alias_and_an_interpolation_are_read(tmp_path: Path) -> None:
    text = "seed: 5 # five\nname: run-${seed}\ninner: &i {local_steps: 24}\n" + MODEL + SILO
    assert load_recipe(written(tmp_path, text)).name == "run-5"


# ---- paths -------------------------------------------------------------------------------


def test_relative_paths_are_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "pieces.model").touch()
    text = MODEL + "tokenizer: shared\nshared_tokenizer: pieces.model\n"
    text += "silos: {ant: {files: [a/*.txt, /abs/b.txt, ~/c.txt], validation_files: [v.txt]}}\n"
    written(tmp_path / "sub", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe("sub/recipe.yaml")
    folder = tmp_path.resolve() / "sub"
    assert recipe.silos["ant"].files == [
        str(folder / "a/*.txt"),
        "/abs/b.txt",
        "/home/someone/c.txt",
    ]
    assert recipe.silos["ant"].validation_files == [str(folder / "v.txt")]
    assert recipe.shared_tokenizer == str(folder / "pieces.model")


def test_a_tokenizer_in_the_home_folder_is_found(
    recipe: RecipeOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pieces.model").touch()
    found = recipe("tokenizer=shared shared_tokenizer=~/pieces.model").shared_tokenizer
    assert found == str(tmp_path / "pieces.model")


def test_an_unknown_users_home_is_taken_as_it_is(recipe: RecipeOf) -> None:
    files = recipe("silos.ant.files=[~no-such-user/x]").silos["ant"].files
    assert files[0].endswith("/~no-such-user/x")


def test_a_recipe_is_found_from_any_folder_beside_conf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("conf/demo.yaml").name == "demo"


def test_the_working_directory_goes_before_conf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "conf").mkdir()
    written(tmp_path / "conf", "name: mine\n" + MODEL + SILO, "demo.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("conf/demo.yaml").name == "mine"


@pytest.mark.parametrize(
    ("argument", "variable", "expected"),
    [
        ("/given", "/set", "/given"),
        ("", "/set", "/set"),
        ("", None, "/home/someone/.dept-fl"),
        ("", "", "/home/someone/.dept-fl"),
        ("~/h", "/set", "/home/someone/h"),
    ],
)
def test_home_is_the_argument_then_the_variable_then_the_default(
    monkeypatch: pytest.MonkeyPatch, argument: str, variable: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    if variable is None:
        monkeypatch.delenv("DEPT_HOME", raising=False)
    else:
        monkeypatch.setenv("DEPT_HOME", variable)
    assert home_dir(argument) == Path(expected)


@pytest.mark.parametrize(
    ("argument", "variable"), [("rel/x", "/set"), ("", "rel/x"), ("~nobody-here/x", "")]
)
def test_a_relative_home_is_refused(
    monkeypatch: pytest.MonkeyPatch, argument: str, variable: str
) -> None:
    monkeypatch.setenv("DEPT_HOME", variable)
    with pytest.raises(DeptError, match=r"x': must be absolute"):
        home_dir(argument)


# ---- as JSON -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    ["", "share_samples=false outer.momentum=null", "model.config.rope_scaling.factor=2.0"],
)
def test_a_recipe_comes_back_from_json_as_it_went(recipe: RecipeOf, overrides: str) -> None:
    sent = recipe(overrides)
    assert recipe_from_json(sent.to_json()) == sent


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_the_recipes_that_come_along_come_back_from_json(file: Path) -> None:
    assert recipe_from_json(load_recipe(file).to_json()) == load_recipe(file)


def test_json_does_not_depend_on_the_order_of_silos(recipe: RecipeOf) -> None:
    one = recipe()
    other = replace(one, silos=dict(reversed(one.silos.items())))
    assert one.to_json() == other.to_json()


@pytest.mark.parametrize("dollar", ["$", "\\u0024"])
@pytest.mark.parametrize("place", ["name", "silo", "model"])
def test_an_interpolation_from_the_server_is_refused(
    recipe: RecipeOf, dollar: str, place: str
) -> None:
    tree = asdict(recipe())
    if place == "name":
        tree["name"] = "@{oc.env:HOME}"
    elif place == "silo":
        tree["silos"]["ant"]["files"] = ["@{oc.env:HOME}"]
    else:
        tree["model"]["config"]["deep"] = {"deeper": ["@{oc.env:HOME}"]}
    with pytest.raises(ConfigError, match=r"may not hold '\$\{'"):
        recipe_from_json(json.dumps(tree).replace("@", dollar))


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a mapping"),
        ("null", "not a mapping"),
        ("{}", "model: set model.preset"),
        ('{"rounds": "???"}', "rounds"),
        ('{"zzz": 1}', "zzz: no such setting"),
        ('{"rounds": [1]}', "rounds=[1]: must be a whole number"),
        ('{"silos": {"../x": {"files": ["a"]}}}', "silos.../x: a silo's name"),
    ],
    ids=range(10),
)
def test_what_is_no_recipe_is_refused(text: str, fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from_json(text)
    assert any(fragment in problem for problem in caught.value.problems)


# ---- differences -------------------------------------------------------------------------


def test_equal_recipes_have_no_differences(recipe: RecipeOf) -> None:
    assert differences(recipe(), recipe()) == []


def test_differences_are_listed_by_key(recipe: RecipeOf) -> None:
    words = "rounds=5 inner.local_steps=3 only=[ant] silos.bee.max_bytes=9 share_samples=true"
    words += " model.config.hidden_size=48"
    assert differences(recipe(), recipe(words)) == [
        "inner.local_steps: 2 -> 3",
        "model.config.hidden_size: 16 -> 48",
        "only: [] -> ['ant']",
        "rounds: 4 -> 5",
        "share_samples: None -> True",
        "silos.bee.max_bytes: 0 -> 9",
    ]


def test_a_new_silo_is_a_difference(recipe: RecipeOf) -> None:
    keys = [line.split(":")[0] for line in differences(recipe(), recipe("silos.new.files=[x]"))]
    assert "silos.new.files" in keys
    assert all(key.startswith("silos.new.") for key in keys)


# ---- what is refused ---------------------------------------------------------------------

BAD_OVERRIDES = [
    # unknown
    ("roundz=3", "roundz: no such setting; did you mean 'rounds'?"),
    ("zzz=3", "zzz: no such setting; known: name, seed, variant"),
    ("local_steps=3", "local_steps: no such setting; did you mean 'inner.local_steps'?"),
    ("inner.local_step=3", "no such setting; did you mean 'inner.local_steps'?"),
    ("inner.qqqq=3", "inner.qqqq: no such setting; known: local_steps, batch_size"),
    ("rounds.x=3", "rounds.x: no such setting; rounds is a whole number"),
    ("model.config.=3", "model.config.: no such setting"),
    ("silos.ant.filez=[x]", "silos.ant.filez: no such setting of a silo; did you mean 'files'?"),
    (
        "silos.ant.zzz=[x]",
        "silos.ant.zzz: no such setting of a silo; known: files, validation_files",
    ),
    # of the wrong kind
    ("rounds=many", "rounds='many': must be a whole number"),
    ("only=[[ant]]", "only=[['ant']]: must be a list, such as [a, b]"),
    ("only=[null]", "only=[None]: must be a list, such as [a, b]"),
    ("silos.ant.files=[[x.txt]]", "silos.ant.files=[['x.txt']]: must be a list, such as [a, b]"),
    ("inner.betas=[[0.9],0.95]", "inner.betas=[[0.9], 0.95]: must be a list of numbers"),
    ("rounds=1.5", "rounds=1.5: must be a whole number"),
    ("rounds=true", "rounds=True: must be a whole number"),
    ("rounds=null", "rounds=None: must be a whole number"),
    ("rounds=", "rounds='': must be a whole number"),
    ("rounds=[1]", "rounds=[1]: must be a whole number"),
    ("rounds=???", "rounds: '???' means no value; write the value itself"),
    ("inner.learning_rate=fast", "inner.learning_rate='fast': must be a number"),
    ("outer.momentum=fast", "outer.momentum='fast': must be a number or null"),
    ("inner.betas=0.9", "inner.betas=0.9: must be a list of numbers, such as [0.9, 0.95]"),
    ("inner.betas=[a,b]", "inner.betas=['a', 'b']: must be a list of numbers"),
    ("only=ant", "only='ant': must be a list, such as [a, b]"),
    ("deduplicate=perhaps", "deduplicate='perhaps': must be true or false"),
    ("share_samples=maybe", "share_samples='maybe': must be true or false or null"),
    ("variant=[glob]", "variant=['glob']: must be text"),
    ("silos=3", "silos=3: must be a mapping of silos by name"),
    ("model.config=3", "model.config=3: must be a mapping of settings"),
    ("silos.ant.max_bytes=1MB", "silos.ant.max_bytes='1MB': must be a whole number"),
    ("silos.ant.files=x.txt", "silos.ant.files='x.txt': must be a list, such as [a, b]"),
    ("inner=3", "inner: this is a group of settings; name one of local_steps"),
    ("inner=null", "inner: this is a group of settings"),
    ("model=gpt2", "model: this is a group of settings; name one of preset, config"),
    ("silos.fr=3", "silos.fr: a silo needs a mapping, such as {files: ['data/*.txt']}"),
    ("silos.fr={}", "silos.fr: a silo needs a mapping"),
    # overrides that are none
    ("rounds", "override 'rounds': expected key=value, such as rounds=4"),
    ("=3", "override '=3': expected key=value"),
    ("name='x", "No closing quotation; quote the value"),
    ("name=${nope}", "name: Interpolation key 'nope' not found; write the value itself"),
    ("name=${name}", "name: Recursive interpolation"),
    ("name=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
    # choices
    ("variant=Glob", "variant='Glob': must be one of glob, trim, spec"),
    ("tokenizer=mine", "tokenizer='mine': must be one of own, shared"),
    ("device=tpu", "device='tpu': must be one of auto, cpu, cuda"),
    ("inner.state=lose", "inner.state='lose': must be one of keep, reset"),
    ("inner.precision=fp8", "inner.precision='fp8': must be one of auto, fp32, bf16"),
    ("outer.optimizer=lion", "must be one of average, nesterov, adam"),
    ("outer.merge=mode", "outer.merge='mode': must be one of mean, median, trimmed-mean"),
    ("silos.ant.content=x", "silos.ant.content='x': must be one of text, code, docstrings"),
    ("silos.ant.sample_by=x", "must be one of auto, document, paragraph, line"),
    ("silos.ant.encoding=utf9", "silos.ant.encoding='utf9': no such text encoding; utf-8"),
    ("silos.ant.encoding=hex", "silos.ant.encoding='hex': no such text encoding"),
    # ranges
    ("rounds=0", "rounds=0: must be at least 1"),
    ("rounds=-3", "rounds=-3: must be at least 1"),
    ("vocab_size=299", "vocab_size=299: must be at least 300"),
    ("tokenizer_train_bytes=0", "tokenizer_train_bytes=0: must be at least 1000"),
    ("sequence_tokens=1", "sequence_tokens=1: must be at least 2"),
    ("silos_per_round=-1", "silos_per_round=-1: must be at least 0"),
    ("min_silos=0", "min_silos=0: must be at least 1"),
    ("silos.ant.vocab_size=299", "silos.ant.vocab_size=299: must be at least 300, or 0"),
    ("silos.ant.vocab_size=-1", "silos.ant.vocab_size=-1: must be at least 300, or 0"),
    ("round_attempts=0", "round_attempts=0: must be at least 1"),
    ("sample_tokens=-1", "sample_tokens=-1: must be at least 0"),
    ("validation_max_bytes=0", "validation_max_bytes=0: must be at least 1"),
    ("inner.local_steps=0", "inner.local_steps=0: must be at least 1"),
    ("inner.batch_size=0", "inner.batch_size=0: must be at least 1"),
    ("inner.micro_batch_size=-1", "inner.micro_batch_size=-1: must be at least 0"),
    ("inner.warmup_steps=-1", "inner.warmup_steps=-1: must be at least 0"),
    ("inner.newcomer_steps=-1", "inner.newcomer_steps=-1: must be at least 0"),
    ("inner.weight_decay=-1", "inner.weight_decay=-1.0: must be from 0 to 100"),
    ("inner.weight_decay=.nan", "inner.weight_decay=nan: must be from 0 to 100"),
    ("inner.learning_rate=0", "inner.learning_rate=0.0: must be above 0 and at most 10"),
    ("inner.learning_rate=-1", "inner.learning_rate=-1.0: must be above 0 and at most 10"),
    ("inner.learning_rate=.nan", "inner.learning_rate=nan: must be above 0"),
    ("inner.clip_norm=0", "inner.clip_norm=0.0: must be above 0"),
    ("inner.final_learning_rate_fraction=2", "fraction=2.0: must be from 0 to 1"),
    ("outer.learning_rate=0", "outer.learning_rate=0.0: must be above 0 and at most 10"),
    ("outer.epsilon=0", "outer.epsilon=0.0: must be above 0 and at most 1"),
    ("outer.trim_fraction=0.5", "outer.trim_fraction=0.5: must be from 0 to below 0.5"),
    ("outer.trim_fraction=-0.1", "outer.trim_fraction=-0.1: must be from 0 to below 0.5"),
    ("outer.trim_fraction=.nan", "outer.trim_fraction=nan: must be from 0 to below 0.5"),
    ("outer.clip_delta=-1", "outer.clip_delta=-1.0: must be from 0 to 1e+09"),
    ("outer.clip_delta=.inf", "outer.clip_delta=inf: must be from 0 to 1e+09"),
    ("largest_delta=0", "largest_delta=0.0: must be above 0 and at most 1e+09"),
    ("quorum=0", "quorum=0.0: must be above 0 and at most 1"),
    ("quorum=2", "quorum=2.0: must be above 0 and at most 1"),
    ("validation_fraction=0", "validation_fraction=0.0: must be above 0 and at most 0.9"),
    ("validation_fraction=1", "validation_fraction=1.0: must be above 0 and at most 0.9"),
    ("round_timeout_s=0", "round_timeout_s=0.0: must be above 0"),
    ("inner.betas=[0.9]", "inner.betas=[0.9]: must be two numbers from 0 to below 1"),
    ("inner.betas=[0.9,1.0]", "inner.betas=[0.9, 1.0]: must be two numbers"),
    ("outer.betas=[-0.1,0.9]", "outer.betas=[-0.1, 0.9]: must be two numbers"),
    ("silos.ant.max_bytes=-1", "silos.ant.max_bytes=-1: must be at least 0 (0 = all)"),
    # contradictions
    ("variant=glob", "variant=glob with tokenizer=own"),
    ("variant=trim", "set tokenizer=shared, or variant=spec"),
    ("shared_tokenizer=x", "shared_tokenizer='x' with tokenizer=own: set tokenizer=shared"),
    ("inner.micro_batch_size=3", "inner.micro_batch_size=3: must divide inner.batch_size=4"),
    ("inner.micro_batch_size=8", "inner.micro_batch_size=8: must divide inner.batch_size=4"),
    ("inner.warmup_steps=9", "inner.warmup_steps=9: longer than the whole schedule of"),
    ("outer.momentum=0.9", "outer.momentum=0.9 with outer.optimizer=average: only nesterov"),
    ("outer.optimizer=adam outer.momentum=0.9", "outer.optimizer=adam: only nesterov takes it"),
    ("outer.optimizer=nesterov outer.momentum=1", "outer.momentum=1.0: must be from 0 to below 1"),
    # silos
    (
        "silos.ant.hub=x",
        "silos.ant: set exactly one of files, hub, packages, sources (set: files, hub)",
    ),
    (
        "silos.ant.files=[]",
        "silos.ant: set exactly one of files, hub, packages, sources (set: none)",
    ),
    (
        "silos.new.max_bytes=5",
        "silos.new: set exactly one of files, hub, packages, sources (set: none)",
    ),
    ("silos.ant.files=['\"\"']", "silos.ant: an empty path or package name"),
    ("silos.ant.validation_files=['\"\"']", "silos.ant: an empty path or package name"),
    ("silos.ant.validation_files=v.txt", "silos.ant.validation_files='v.txt': must be a list"),
    (
        "silos.ant.files=[] silos.ant.hub=x silos.ant.validation_files=[v.txt]",
        "validation_files=['v.txt']: only together with files; remove it",
    ),
    (
        "silos.ant.hub_validation_split=validation",
        "silos.ant.hub_validation_split='validation': only together with hub; remove it",
    ),
    ("silos.ant.hub_where=[a=b]", "silos.ant.hub_where=['a=b']: only together with hub"),
    ("silos.ant.hub_files=[a=b]", "silos.ant.hub_files=['a=b']: only together with hub"),
    (
        "silos.ant.files=[] silos.ant.hub=x silos.ant.hub_validation_split=train",
        "silos.ant.hub_validation_split='train': is hub_split too; name another split",
    ),
    *(
        (
            f"silos.ant.files=[] silos.ant.hub=x silos.ant.hub_where=['{condition}']",
            f"silos.ant.hub_where: '{condition}' is no FIELD=VALUE, such as meta.pile_set_name=",
        )
        for condition in ("meta", "=x", "meta=", "meta==x")
    ),
    (
        "silos.ant.files=[] silos.ant.hub=x silos.ant.hub_files=[val.jsonl]",
        "silos.ant.hub_files: 'val.jsonl' is no SPLIT=PATTERN, such as validation=val.jsonl.zst",
    ),
    ("silos.ant.where=[score]", "silos.ant.where: 'score' is no FIELD=VALUE, FIELD!=VALUE, "),
    *(
        (
            f"'silos.ant.where=[\"{condition}\"]'",
            f"silos.ant.where: '{condition}': '{value}' begins with a sign; write {meant}",
        )
        for condition, value, meant in (
            ("language==en", "=en", "language=en"),
            ("language!==en", "=en", "language!=en"),
            ("score=>0.5", ">0.5", "score>=0.5"),
            ("score=<0.5", "<0.5", "score<=0.5"),
            ("score>==0.5", "=0.5", "score>=0.5"),
            ("score==", "=", "score=VALUE"),
        )
    ),
    ("'silos.ant.where=[\"score>=high\"]'", "where: 'score>=high': 'high' is no number; write one"),
    (
        "silos.ant.files=[] silos.ant.packages=[stdlib] silos.ant.where=[a=b]",
        "silos.ant.where=['a=b']: only together with files or hub; remove it",
    ),
    ("silos.ant.min_characters=-1", "silos.ant.min_characters=-1: must be at least 0 (0 = none)"),
    (
        "silos.ant.min_characters=9 silos.ant.max_characters=8",
        "silos.ant.min_characters=9: above max_characters=8, so that no document is left",
    ),
    ("near_duplicates=0.3", "near_duplicates=0.3: must be 0, or from 0.5 to 1"),
    (
        "near_duplicates=0.8 deduplicate=false",
        "near_duplicates=0.8 with deduplicate=false: copies would stay",
    ),
    ("silos.ant.sources.web.files=[x]", "silos.ant: set exactly one of files, hub, packages, sou"),
    (
        "silos.ant.files=[] silos.ant.column=x silos.ant.sources.web.files=[x]",
        "silos.ant.column='x': belongs to a source; move it to sources.NAME.column",
    ),
    (
        "silos.ant.sources.web.weight=1",
        "silos.ant.sources.web: set exactly one of files, hub, packages (set: none)",
    ),
    (
        "silos.ant.sources.a.files=[x] silos.ant.sources.b.files=[x] silos.ant.sources.b.weight=2",
        "silos.ant.sources.a.weight=0.0: other sources have one; give all a weight, or none",
    ),
    (
        "silos.ant.files=[] silos.ant.sources.a.files=[x] silos.ant.max_bytes=9",
        "silos.ant.max_bytes=9: of which source? give each a weight, or a max_bytes of its own",
    ),
    (
        "silos.ant.sources.a.weight=.nan",
        "silos.ant.sources.a.weight=nan: must be from 0 to 1e+06",
    ),
    ("silos.ant.sources.a.sample_by=x", "silos.ant.sources.a.sample_by='x': must be one of"),
    ("silos.ant.sources=x", "silos.ant.sources='x': must be a mapping of sources by name"),
    ("silos.ant.sources.web=x", "silos.ant.sources.web: a source needs a mapping, such as {fil"),
    ("silos.ant.sources.web.wieght=1", "no such setting of a source; did you mean 'weight'?"),
    ("silos.ant.sources.WEB.files=[x]", "silos.ant.sources.WEB: a source's name has lower-case"),
    ("silos.../x.files=[a]", "silos.../x: a silo's name has lower-case letters"),
    ("'silos.A B.files=[a]'", "silos.A B: a silo's name has lower-case letters"),
    ("silos._x.files=[a]", "silos._x: a silo's name has lower-case letters"),
    ("silos..files=[a]", "silos.: a silo's name has lower-case letters"),
    (f"silos.{'x' * 65}.files=[a]", "at most 64"),
    ("only=[zebra]", "only='zebra': no such silo; silos: ant, bee, cat"),
    ("only=[ant,ant]", "only=['ant', 'ant']: names a silo twice"),
    ("without=[zebra]", "without='zebra': no such silo; silos: ant, bee, cat"),
    ("without=[ant,ant]", "without=['ant', 'ant']: names a silo twice"),
    ("without=[ant,bee,cat]", "without=['ant', 'bee', 'cat']: leaves no silo"),
    ("only=[ant] without=[ant]", "without=['ant']: leaves no silo"),
    ("without=[ant] silos_per_round=3", "silos_per_round=3: the run has only 2 silos"),
    ("silos_per_round=4", "silos_per_round=4: the run has only 3 silos; 0 samples all"),
    ("only=[ant] silos_per_round=2", "silos_per_round=2: the run has only 1 silos"),
    # names of folders, and models
    ("name=../x", "name='../x': it becomes part of a folder's name"),
    ("name=", "name='': it becomes part of a folder's name"),
    ("name=.x", "name='.x': it becomes part of a folder's name"),
    ("model.preset=nope", "model.preset='nope': no such preset; presets: gpt2-125m"),
    ("model.preset=nope.yaml", "model.preset='nope.yaml': no such preset"),
    ("model.preset=gpt2-125m", "model.config.model_type='llama': model.preset='gpt2-125m' is of"),
    ("model.config={}", "model: set model.preset (a file of conf/models), model.config"),
    ("model.config.model_type=null", "model: set model.preset"),
    ("model.config.model_type=3", "model: set model.preset"),
]


@pytest.mark.parametrize(
    ("override", "fragment"), BAD_OVERRIDES, ids=[b[0][:40] for b in BAD_OVERRIDES]
)
def test_a_bad_override_is_named_with_its_mend(
    tiny_file: Path, override: str, fragment: str
) -> None:
    found = problems(tiny_file, override)
    assert any(fragment in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


BAD_FILES = [
    ("rounds: [1\n", "not readable as YAML"),
    ("rounds: 1\nrounds: 2\n", "not readable as YAML"),
    ("- rounds\n- 3\n", "expected a mapping of settings at the top"),
    ("just a word\n", "just a word: no such setting"),
    ("name: ${nope}\n", "not readable as YAML: Interpolation key 'nope' not found"),
    ("name: ${name}\n", "not readable as YAML"),
    ("", "model: set model.preset (a file of conf/models), model.config.model_type, or"),
    (SILO, "model: set model.preset"),
    (MODEL + "silos: [ant]\n", "silos=['ant']: must be a mapping of silos by name"),
    (MODEL + "silos: {ant: }\n", "silos.ant: a silo needs a mapping"),
    (MODEL + "silos: {ant: [a.txt]}\n", "silos.ant: a silo needs a mapping"),
    (MODEL + "silos: {ant: {max_bytes: 3}}\n", "silos.ant: set exactly one of"),
    (MODEL + "silos: {../x: {files: [a]}}\n", "silos.../x: a silo's name has"),
    (MODEL + "silos: {a.b: {files: [a]}}\n", "silos.a.b: a silo's name has"),
    (MODEL + "silos: {A B: {files: [a]}}\n", "silos.A B: a silo's name has"),
    (MODEL + "silos: {no: {files: [a]}}\n", "silos.False: a silo's name has"),
    (MODEL + "silos: {no: {files: [a]}}\n", "quote a name that YAML takes for true or false"),
    (SILO + "model: {config: [llama]}\n", "model.config=['llama']: must be a mapping"),
    (SILO + "model:\n", "model: this is a group of settings"),
    (SILO + "model: {preset: list.yaml}\n", "list.yaml: expected a mapping of settings"),
    (SILO + "model: {preset: typeless.yaml}\n", "typeless.yaml: model_type is missing"),
    (SILO + "model: {preset: ../demo}\n", "demo.yaml: model_type is missing"),
    (MODEL + SILO + "rounds: ???\n", "rounds: '???' means no value"),
    (MODEL + SILO + "1: 2\n", "1: no such setting"),
    (MODEL + SILO + "inner: {}\n", "inner: this is a group of settings"),
]


@pytest.mark.parametrize(("text", "fragment"), BAD_FILES)
def test_a_bad_file_is_named_with_its_mend(tmp_path: Path, text: str, fragment: str) -> None:
    written(tmp_path, "- 3\n", "list.yaml")
    written(tmp_path, "n_layer: 3\n", "typeless.yaml")
    found = problems(written(tmp_path, text))
    assert any(fragment in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


@pytest.mark.parametrize("silos", ["", "silos: {}\n", "silos:\n"])
def test_a_recipe_without_silos_is_for_deployments_alone(tmp_path: Path, silos: str) -> None:
    recipe = load_recipe(written(tmp_path, MODEL + silos))
    assert recipe.silo_names == []
    with pytest.raises(ConfigError, match=r"silos: none; name at least one, such as silos\.fr"):
        require_silos(recipe)


@pytest.mark.parametrize("override", ["silos={}", "silos=null"])
def test_silos_may_all_be_taken_away(recipe: RecipeOf, override: str) -> None:
    assert recipe(override).silos == {}
    require_silos(recipe())


def test_a_deployments_recipe_may_name_silos_that_only_their_files_describe(
    tmp_path: Path,
) -> None:
    recipe = load_recipe(written(tmp_path, MODEL + "only: [ant, bee]\nwithout: [bee]\n"))
    assert recipe.silo_names == ["ant"]
    found = problems(written(tmp_path, MODEL), "only=[../x] without=[Bee,Bee]")
    assert [p.split(":")[0] for p in found] == [
        "silos.../x",
        "silos.Bee",
        "silos.Bee",
        "without=['Bee', 'Bee']",
    ]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"name: \xff\xfe\x00")
    assert "not readable as YAML" in problems(file)[0]


@pytest.mark.parametrize("path", ["conf/nope.yaml", "/nope.yaml", "conf", "", "x" * 3000])
def test_a_missing_recipe_is_answered_with_those_there_are(path: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file; recipes that come along: .*conf/demo"):
        load_recipe(path)


def test_all_contradictions_are_listed_at_once(tiny_file: Path) -> None:
    found = problems(tiny_file, "variant=trim rounds=0 quorum=2 only=[zebra] silos.ant.hub=x")
    starts = ("rounds=0", "quorum=2.0", "variant=trim", "silos.ant: set", "only='zebra'")
    assert [p for p in found if p.startswith(starts)] == found
    assert len(found) == len(starts)


def test_settings_that_cannot_be_read_are_listed_with_the_others(tiny_file: Path) -> None:
    words = "roundz=3 rounds=many device=tpu quorum=2 model.preset=nope silos.A.files=[a] stray"
    found = problems(tiny_file, words)
    starts = ("roundz", "rounds='many'", "device='tpu'", "quorum=2.0", "model.preset", "silos.A")
    assert all(any(p.startswith(start) for p in found) for start in starts)
    assert len(found) == len(starts) + 1
    assert "override 'stray'" in " ".join(found)


def test_a_setting_that_cannot_be_read_is_not_held_against_others(tiny_file: Path) -> None:
    assert problems(tiny_file, "tokenizer=[shared] variant=trim") == [
        "tokenizer=['shared']: must be text"
    ]


def test_a_silo_with_a_bad_name_is_told_once(tiny_file: Path) -> None:
    assert len(problems(tiny_file, "'silos.X={files: [a], max_bytes: 3, column: x}'")) == 1


def test_the_error_text_has_a_line_for_each_problem(tiny_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny_file, "rounds=0 quorum=2")
    assert str(caught.value).splitlines() == [
        "bad configuration:",
        "  - rounds=0: must be at least 1",
        "  - quorum=2.0: must be above 0 and at most 1",
    ]


# ---- what follows from the settings ------------------------------------------------------


def test_the_schedule_runs_over_all_rounds(recipe: RecipeOf) -> None:
    assert recipe("rounds=5 inner.local_steps=3").total_steps == 15


def test_a_model_given_anew_keeps_nothing_of_the_one_before(recipe: RecipeOf) -> None:
    made = recipe("'model.config={model_type: gpt2, n_embd: 16}'")
    assert made.model.config == {"model_type": "gpt2", "n_embd": 16}


@pytest.mark.parametrize(("micro", "expected"), [(0, 4), (2, 2), (4, 4)])
def test_a_pass_takes_the_batch_unless_told_otherwise(
    recipe: RecipeOf, micro: int, expected: int
) -> None:
    assert recipe(f"inner.micro_batch_size={micro}").inner.sequences_per_pass == expected


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ("", "spec-opt"),
        ("tokenizer=shared", "spec"),
        ("tokenizer=shared variant=glob", "glob"),
        ("tokenizer=shared variant=trim", "trim"),
    ],
)
def test_the_label_is_the_papers(recipe: RecipeOf, overrides: str, label: str) -> None:
    assert recipe(overrides).label == label
