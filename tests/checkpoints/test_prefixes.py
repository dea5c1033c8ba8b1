import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_probe.checkpoints.prefixes import strip_prefixes

PREFIX = st.lists(st.sampled_from(["module", "_orig_mod", "model", "net"]), max_size=5)
NAMES = ["conv1.weight", "conv1.bias", "layer1.0.weight", "fc.weight", "fc.bias"]


def prefixed(components, name):
    return ".".join([*components, name])


@given(PREFIX)
def test_any_order_of_prefixes_is_removed_when_the_names_are_known(prefix):
    keys = [prefixed(prefix, name) for name in NAMES]
    assert strip_prefixes(keys, NAMES) == dict(zip(keys, NAMES, strict=True))


@given(PREFIX)
def test_any_order_of_prefixes_that_all_names_share_is_removed_without_knowing_the_names(prefix):
    keys = [prefixed(prefix, name) for name in NAMES]
    assert strip_prefixes(keys, None) == dict(zip(keys, NAMES, strict=True))


@given(PREFIX, st.lists(st.sampled_from(["module", "_orig_mod"]), min_size=1, max_size=2, unique=True))
def test_wrappers_inside_names_are_removed_too(prefix, inside):
    wanted = ["backbone.conv.weight", "backbone.fc.weight", "head.weight"]
    keys = [prefixed(prefix, name.replace("backbone", ".".join(["backbone", *inside]))) for name in wanted]
    assert strip_prefixes(keys, wanted) == dict(zip(keys, wanted, strict=True))


@given(PREFIX, st.lists(st.sampled_from(["module", "model", "net"]), min_size=1, max_size=2))
def test_components_that_the_network_has_itself_are_kept(prefix, own):
    wanted = [prefixed(own, name) for name in NAMES]
    keys = [prefixed(prefix, name) for name in wanted]
    assert strip_prefixes(keys, wanted) == dict(zip(keys, wanted, strict=True))


@given(
    st.lists(
        st.lists(st.sampled_from(["module", "_orig_mod", "model", "net", "a", "w"]), min_size=1, max_size=4), max_size=8
    )
)
@pytest.mark.parametrize("wanted", [None, ["w"], ["a.w", "w", "module.w"]])
def test_names_stay_distinct(wanted, components):
    keys = {".".join(parts) for parts in components}
    way = strip_prefixes(keys, wanted)
    assert set(way) == keys
    assert len(set(way.values())) == len(keys)


def test_names_that_fit_are_left_alone():
    keys = ["model.weight", "net.weight"]
    assert strip_prefixes(keys, keys) == {"model.weight": "model.weight", "net.weight": "net.weight"}
    assert strip_prefixes(keys, None) == {"model.weight": "model.weight", "net.weight": "net.weight"}


def test_a_prefix_that_not_all_names_share_is_kept_when_nothing_is_known():
    keys = ["module.conv.weight", "fc.weight"]
    assert strip_prefixes(keys, None) == {key: key for key in keys}


def test_compiled_part_is_unwrapped_even_when_nothing_is_known():
    keys = ["model._orig_mod.conv.weight", "loss.weight"]
    assert strip_prefixes(keys, None) == {keys[0]: "model.conv.weight", keys[1]: "loss.weight"}


def test_blind_replacement_would_damage_names_that_contain_a_prefix():
    keys = ["module.submodule.weight", "module.mymodel.weight"]
    wanted = ["submodule.weight", "mymodel.weight"]
    assert strip_prefixes(keys, wanted) == dict(zip(keys, wanted, strict=True))
    assert [key.replace("module.", "").replace("model.", "") for key in keys] != wanted


def test_counter_of_an_averaged_model_has_no_name_in_the_network():
    keys = ["n_averaged", "module.w"]
    assert strip_prefixes(keys, None) == {"module.w": "w"}
    assert strip_prefixes(keys, ["w"]) == {"module.w": "w"}
    assert strip_prefixes(keys, keys) == {key: key for key in keys}


def test_absurdly_many_prefixes_take_no_time():
    key = "module." * 5000 + "w"
    assert set(strip_prefixes([key], ["w"])) == {key}
    assert set(strip_prefixes([key], None)) == {key}


def test_no_keys():
    assert strip_prefixes([], None) == {}
    assert strip_prefixes([], ["w"]) == {}
