"""docs/configuration.md says what the code takes, no more and no less."""

from __future__ import annotations

import ast
import sys

import pytest
from places import ROOT
from reference_page import FLAGS, KEYS, PAGE, PASSED, commands, old_names, page

from vllm_gumiho.drafters import PER_REQUEST, SEEDED_TEXT
from vllm_gumiho.drafters.draft_weights import KEY as DRAFT_WEIGHTS

REQUEST = ROOT / "vllm_gumiho" / "request"


def test_the_page_is_the_one_the_code_makes():
    assert PAGE.read_text() == page(), "write it again: python tests/support/reference_page.py"


def test_every_key_but_our_own_is_one_of_vllms_speculative_config():
    from vllm.config import SpeculativeConfig

    own = {key.name for key in KEYS if key.name not in SpeculativeConfig.__dataclass_fields__}
    assert own == {PER_REQUEST, SEEDED_TEXT, DRAFT_WEIGHTS}


def test_every_key_that_a_request_is_asked_for_is_on_the_page():
    from vllm_gumiho.plugin.arguments import _FLAGS

    read = set(_FLAGS.values()) | {
        key for file in REQUEST.glob("*.py") for key in _keys_read(ast.parse(file.read_text()))
    }
    assert {"method", "revision", "num_speculative_tokens_per_batch_size", "parallel_drafting"} <= read
    assert read <= {key.name for key in KEYS if key.use != PASSED}


def _keys_read(tree: ast.AST) -> list[str]:
    """Keys in ``spec.get(key)`` and ``self.spec.get(key)``; a name stands for a constant of theirs."""
    from vllm_gumiho.request.resolve import Request

    constants = sys.modules[Request.__module__]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("spec.get", "self.spec.get"):
            key = node.args[0]
            found.append(getattr(constants, key.id) if isinstance(key, ast.Name) else ast.literal_eval(key))
    return found


def test_every_form_of_a_request_is_taken_by_vllms_parser():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    assert set(FLAGS) <= set(EngineArgs.add_cli_args(FlexibleArgumentParser())._option_string_actions)


def test_every_command_is_in_a_panel():
    assert {panel for panel, *_ in commands()} == {"Serve", "Train", "Measure"}


OURS = {name: command for _, name, command in commands()}


@pytest.mark.parametrize("name", OURS)
def test_every_option_is_explained_and_every_old_name_has_a_new_one(name):
    options = [param for param in OURS[name].params if param.param_type_name == "option"]
    assert [param.name for param in options if not param.help] == []
    taken = {option for param in options for option in (*param.opts, *param.secondary_opts)}
    assert set(old_names(OURS[name]).values()) <= taken


def test_the_old_names_are_read_out_of_the_commands():
    assert old_names(OURS["vllm-gumiho tune"]) == {"--max-batch": "--concurrency"}
    assert old_names(OURS["vllm-gumiho check"]) == {}
