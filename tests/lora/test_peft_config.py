"""What PEFT's `save_pretrained` writes: the strength stands in a file beside the weights."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import save

from tests.lora.saved_by_peft import ALPHA, CONFIG, RANK, SOURCES, WEIGHTS, config
from tests.support import tiny
from weights.serving.errors import InvalidFileError

MODULES = ["to_q", "to_k", "proj_out"]


def trained(model, folder, **options):
    """Save a LoRA as PEFT does, and return what it makes of the model's weights."""
    options = {"target_modules": MODULES, "init_lora_weights": False} | options
    return saved(model, folder, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options))


def saved(model, folder, settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    adapted.save_pretrained(folder)
    return dict(adapted.merge_and_unload().named_parameters())


def expect(case, text, merged):
    """The transformer's weights with an adapter are what PEFT makes of them."""
    found = tiny.deltas(case.loader().load(text).adapter, case.flux)
    for name, base in case.flux["transformer"].named_parameters():
        weight = base.detach() + found.get(("transformer", name), 0)
        torch.testing.assert_close(weight, merged[name].detach(), rtol=1e-4, atol=1e-4)
    assert found


@pytest.mark.filterwarnings("ignore")  # PEFT has some of its own
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"attn.to_k": 3}},
        {"alpha_pattern": {"^proj_out": 3, "transformer_blocks.0.attn.to_q": 12}},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3}, "use_rslora": True},
        {"use_dora": True},
    ],
    ids=str,
)
def test_the_same_weights_as_peft(case, tmp_path, options):
    merged = trained(case.flux["transformer"], tmp_path, **options)
    expect(case, str(tmp_path / WEIGHTS), merged)


@pytest.mark.filterwarnings("ignore")
def test_the_same_weights_as_peft_where_it_wrapped_the_whole_model(case, tmp_path):
    whole = torch.nn.ModuleDict({"transformer": case.flux["transformer"]})
    first = "^transformer.transformer_blocks.0.attn.to_q"
    pattern = {"attn.to_k": 2, first: 12, "transformer.proj_out": 3}
    merged = trained(whole, tmp_path, alpha_pattern=pattern)
    named = {name.removeprefix("transformer."): weight for name, weight in merged.items()}
    expect(case, str(tmp_path / WEIGHTS), named)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=MODULES, init_weights=False),
        peft.LoKrConfig(r=RANK, alpha=ALPHA, target_modules=MODULES, init_weights=False),
        peft.LoKrConfig(r=64, alpha=ALPHA, target_modules=MODULES, init_weights=False),
        peft.LoKrConfig(
            r=64,
            alpha=ALPHA,
            rank_pattern={"to_q": 128, "proj_out": 2},
            alpha_pattern={"to_k": 3},
            target_modules=MODULES,
            init_weights=False,
        ),
    ],
    ids=["LoHa", "LoKr", "LoKr of whole matrices", "LoKr with patterns"],
)
def test_the_same_weights_as_peft_for_other_kinds(case, tmp_path, adapter):
    merged = saved(case.flux["transformer"], tmp_path, adapter)
    expect(case, str(tmp_path / WEIGHTS), merged)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_changes_the_model_first_is_refused(case, tmp_path, start):
    trained(case.flux["transformer"], tmp_path, init_lora_weights=start)
    with pytest.raises(InvalidFileError, match=f"init_lora_weights is '{start}': .*conversion"):
        case.loader().load(str(tmp_path / WEIGHTS))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_other_ways_to_begin_are_read(case, tmp_path, start):
    merged = trained(case.flux["transformer"], tmp_path, init_lora_weights=start)
    expect(case, str(tmp_path / WEIGHTS), merged)


@pytest.mark.parametrize("source", SOURCES)
def test_the_strength_of_the_configuration(case, serve, source):
    text = serve(source, case.files)
    loaded = case.loader().load(text)
    assert case.strength(loaded.adapter) == pytest.approx(ALPHA / RANK)
    assert loaded.adapter.digest != case.digest
    assert f"{WEIGHTS if 'tar' not in source else 'a.tar'} with {CONFIG}, " in loaded.describe()
    assert case.load(text) == pytest.approx(ALPHA / RANK)  # after a restart


@pytest.mark.parametrize("source", SOURCES)
def test_a_configuration_in_a_folder(case, serve, source):
    files = {"x/" + name: content for name, content in case.files.items()}
    assert case.load(serve(source, {**files, CONFIG: b"{"})) == pytest.approx(ALPHA / RANK)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: None},
        {CONFIG: None, f"x/{CONFIG}": config()},
        {WEIGHTS: None, "lora.safetensors": True},
        {CONFIG: config(peft_type="IA3")},
        {CONFIG: b'{"r": 4}'},
    ],
    ids=["no config", "in another folder", "of other weights", "of another kind", "no alpha"],
)
def test_what_no_configuration_is_for_stays_as_it_is(case, serve, source, files):
    named = {name: case.weights if c is True else c for name, c in {**case.files, **files}.items()}
    text = serve(source, {name: content for name, content in named.items() if content})
    loaded = case.loader().load(text)
    assert case.strength(loaded.adapter) == pytest.approx(1)
    assert loaded.adapter.digest == case.digest
    assert CONFIG not in loaded.describe()
    copies = list((case.settings.cache.root / "objects").iterdir())
    assert len(copies) == ("tar" in source)


@pytest.mark.parametrize("source", SOURCES)
def test_settings_in_the_header_come_first(case, serve, source):
    metadata = {"lora_adapter_metadata": json.dumps({"lora_alpha": 2 * RANK})}
    content = save(case.tensors, metadata)
    loaded = case.loader().load(serve(source, {**case.files, WEIGHTS: content}))
    assert case.strength(loaded.adapter) == pytest.approx(2)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b"\xff", b"[" * 9999, b'{"r": 4}' + b" " * (1 << 20)]
)
def test_a_damaged_configuration_is_named(case, serve, source, content):
    text = serve(source, {**case.files, CONFIG: content})
    said = rf": the {CONFIG} beside it.* Save the adapter again"
    with pytest.raises(InvalidFileError, match=said):
        case.load(text)
    assert case.weights not in [path.read_bytes() for path in case.stored()]


def test_a_configuration_that_is_too_large_is_not_fetched(case, hub, serve):
    text = serve("hub", {**case.files, CONFIG: b" " * (2 << 20)})
    with pytest.raises(InvalidFileError, match="more than the 1048576 bytes"):
        case.load(text)
    assert hub.count("GET", "/resolve/") == 0


def test_too_many_configurations_in_a_tar_are_refused(case, serve):
    more = {f"{number}/{CONFIG}": config() for number in range(65)}
    with pytest.raises(InvalidFileError, match=rf"a\.tar: .*more than 64 files {CONFIG}"):
        case.load(serve("tar", {**case.files, **more}))


def test_what_cannot_be_applied_names_the_configuration(case, serve):
    files = {**case.files, CONFIG: config(alpha_pattern={".*to_q": 3})}
    with pytest.raises(InvalidFileError, match=rf"with {CONFIG}: alpha_pattern '\.\*to_q' is not"):
        case.load(serve("hub", files))
