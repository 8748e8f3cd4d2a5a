"""Reads configurations: OmegaConf dotlists and mappings over the presets in `configs/`.

Nobody else reads YAML or dotlists for a `Config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from suite.config import CONFIGS, ClusterConfig, Config, presets
from suite.config_rules import resolve
from suite.errors import UsageError, first_line, unknown

SHORT_KEYS = ("impl", "testbed", "workload", "cluster")
"""Keys with a name of their own, which may be given alone: `impl=ddp`."""


def load(overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """The configuration for a dotlist (`["impl=ddp", "train.steps=3"]`) or a nested mapping.

    `impl=NAME` and `testbed=NAME` are short for `impl.name=NAME` and `testbed.name=NAME`;
    `workload=NAME` and `cluster=NAME` load that preset. Raises UsageError for an unknown key, preset or
    value.
    """
    try:
        given = _given(overrides)
        _refuse_references(OmegaConf.to_container(given, resolve=False))
        for key in SHORT_KEYS:
            if given.get(key) is not None and not isinstance(given[key], DictConfig):
                given[key] = {"name": given[key]}
        config = _typed(given)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"cannot read the configuration: {first_line(error)}") from error
    return resolve(config)


def dotlist_value(text: str) -> Any:
    """What stands behind `key=` in a dotlist. Raises UsageError for what is none, or refers to something."""
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except Exception as error:  # yaml's own errors share no base class with OmegaConf's
        raise UsageError(f"cannot read {text!r} as a value: {first_line(error)}") from error
    assert isinstance(value, dict)
    _refuse_references(value)
    return value["value"]


def _typed(given: DictConfig) -> Config:
    merged = OmegaConf.structured(Config)
    merged = _merge(
        merged, _preset("workloads", OmegaConf.select(given, "workload.name", default="bert-tiny"))
    )
    if given.get("cluster") is not None:
        merged.cluster = ClusterConfig()
        merged = _merge(merged, _preset("clusters", OmegaConf.select(given, "cluster.name", default="p3dn")))
    config = OmegaConf.to_object(_merge(merged, given))
    assert isinstance(config, Config)
    return config


def _refuse_references(value: Any) -> None:
    """No value may be fetched from elsewhere: an environment variable, for one, may hold a secret."""
    if isinstance(value, dict):
        for item in value.values():
            _refuse_references(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_references(item)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise UsageError(f"{value!r} is not possible as a value; write the value itself")


def _preset(kind: str, name: Any) -> Any:
    if name not in presets(kind):
        raise unknown(kind.removesuffix("s"), str(name), presets(kind))
    return OmegaConf.load(CONFIGS / kind / f"{name}.yaml")


def _given(overrides: Iterable[str] | Mapping[str, Any]) -> DictConfig:
    if isinstance(overrides, Mapping):
        try:
            result = OmegaConf.create(dict(overrides))
        except Exception as error:  # keys and values that OmegaConf has no types for
            raise UsageError(f"cannot read the configuration: {first_line(error)}") from error
    else:
        words = list(overrides)
        for word in words:
            if "=" not in word:
                raise UsageError(f"{word!r} is not an option; options are written key=value")
        # A bare name and a key below it may both be given (`workload=x workload.data=y`), in
        # any order: the name goes first, or OmegaConf would overwrite the rest.
        short = {f"{key}=" for key in SHORT_KEYS}
        words = [
            word.replace("=", ".name=", 1) if word[: word.index("=") + 1] in short else word for word in words
        ]
        try:
            result = OmegaConf.from_dotlist(words)
        except Exception as error:
            raise UsageError(f"cannot read the options {words}: {first_line(error)}") from error
    assert isinstance(result, DictConfig)
    return result


def _merge(base: Any, extra: Any) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, extra)
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise unknown("key", key, key_names(Config(cluster=ClusterConfig()))) from error
    except OmegaConfBaseException as error:
        where = error.full_key or "a group of keys"
        raise UsageError(f"bad value for {where}: {first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def key_names(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration dataclass, for error messages and documentation."""
    names: list[str] = []
    for item in fields(node):
        value = getattr(node, item.name)
        name = prefix + item.name
        names += [name, *key_names(value, name + ".")] if is_dataclass(value) else [name]
    return names
