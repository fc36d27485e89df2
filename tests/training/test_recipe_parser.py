from __future__ import annotations

from mmfusion.training.recipe_parser import ignored_key, with_suggestion


def test_a_key_left_out_for_being_empty_is_found():
    given = {"other": 1, "model": {"class_path": "A", "init_args": {"x": None}}}
    parsed = {"model": {"class_path": "A", "init_args": {}}}
    assert ignored_key(given, parsed) == "model.init_args.x"
    assert ignored_key(given, given) is None


def test_arguments_of_a_class_that_another_recipe_replaced_do_not_count():
    given = {"class_path": "A", "init_args": {"x": None}}
    assert ignored_key(given, {"class_path": "B", "init_args": {"y": 1}}) is None


def test_the_whole_key_is_suggested():
    keys = {"pack_tokens": "data.pack_tokens", "data.pack_tokens": "data.pack_tokens"}
    assert with_suggestion("Option 'pack_tokenz' is wrong", keys).endswith("'data.pack_tokens'?")
    assert with_suggestion("Option 'zzz' is wrong", keys) == "Option 'zzz' is wrong"
