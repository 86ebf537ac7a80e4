"""A choice as an ordinary recipe: few rules, that a person can read, edit and run again."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from defaker_opt.errors import DefakerError
from defaker_opt.files import whole_file
from defaker_opt.limits import Limit, limits_as_json
from defaker_opt.methods import SchemeName
from defaker_opt.recipe import Recipe, parse_recipe
from defaker_opt.runtime.spec import STAGES
from defaker_opt.search import METHODS, Formats

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

# Of some 350 tokens the answer's is one; weighted alike, image tokens would decide alone.
_BALANCE = {"image": 1, "text": 1, "answer": 1}


def recipe_data(
    choice: Formats, description: str, source: str, target: str, calibration: str, limits: Mapping[str, Limit]
) -> dict[str, Any]:
    """The content of a recipe's YAML file."""
    rules = [_rule(match, scheme) for match, scheme in rules_of(choice)]
    looks = any("method" in rule for rule in rules)
    return {
        "description": description,
        "source": source,
        "target": target,
        **({"calibration": calibration} if looks else {}),
        "passes": [{"quantize": {"rules": rules, **({"balance": dict(_BALANCE)} if looks else {})}}],
        "accept": limits_as_json(limits),
    }


def _rule(match: str, scheme: SchemeName) -> dict[str, Any]:
    rule: dict[str, Any] = {"match": match, "scheme": scheme}
    if scheme in METHODS:
        method, options = METHODS[scheme]
        rule |= {"method": method, "options": dict(options)}
    return rule


def rules_of(choice: Formats) -> Iterator[tuple[str, SchemeName]]:
    """Globs and schemes, the first that matches holds; exceptions first, each stage's most frequent scheme last."""
    for stage in STAGES:
        own = {name: scheme for name, scheme in choice.items() if name.partition(".")[0] == stage}
        if not own:
            continue
        [(usual, _)] = Counter(own.values()).most_common(1)
        alike: dict[str, dict[str, SchemeName]] = defaultdict(dict)
        for name, scheme in own.items():
            alike[_NUMBER.sub("*", name)][name] = scheme
        for pattern, members in alike.items():
            schemes = set(members.values())
            # A star also matches dots, and so may reach further than the numbers that it stands for.
            matched = [name for name in choice if fnmatchcase(name, pattern)]
            if len(schemes) == 1 and len(matched) == len(members):
                yield from ((pattern, scheme) for scheme in schemes if scheme != usual)
            else:
                yield from ((name, scheme) for name, scheme in members.items() if scheme != usual)
        yield f"{stage}.*", usual


def recipe_text(data: Mapping[str, Any]) -> str:
    """As YAML, what is innermost on one line."""
    return yaml.safe_dump(dict(data), sort_keys=False, width=120, default_flow_style=None)


def write_recipe(data: Mapping[str, Any], path: Path) -> Recipe:
    """Write the YAML file and read it back. Raises DefakerError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DefakerError(f"{path.parent}: cannot be made ({error.strerror}); choose another --output") from error
    with whole_file(path) as partial:
        partial.write_text(recipe_text(data), encoding="utf-8")
    return parse_recipe(path.stem, dict(data), path)
