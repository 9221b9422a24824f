"""`aurora generate` shows a prompt only when it can be continued, and speaks of the options a user typed."""

import pytest

from aurora_train.cli.main import main


def test_nothing_is_printed_by_a_run_whose_recipe_makes_no_text(here, capsys):
    assert main(["train", "toy.yaml", "train.steps=1", "--run", "toyrun", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["generate", "toyrun", "--prompt", "once upon"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options,says",
    [(["--max-tokens", "-1"], ["--max-tokens: --max-tokens is -1"]), (["--top-p", "2"], ["--top-p: ", "at most 1"])],
)
def test_a_wrong_option_is_named_as_it_was_typed_before_anything_is_printed(options, says, language_run, capsys):
    assert main(["generate", "run", "--prompt", "once upon", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "max_new_tokens" not in err
    for part in says:
        assert part in err


def test_a_prompt_that_is_to_get_no_token_is_still_printed(language_run, capsys):
    assert main(["generate", "run", "--prompt", "once upon", "--max-tokens", "0"]) == 0
    assert capsys.readouterr().out == "once upon\n"
