"""`aurora chat`, and `aurora generate`, with an open model: a GGUF file that nobody trained, read like a run."""

import io
import json

import pytest
from tiny_sources import CHATML, source_of

from aurora_train.cli.chat import Conversation
from aurora_train.cli.main import main
from aurora_train.errors import UserError
from aurora_train.interop.gguf.write import write_gguf
from aurora_train.loading import load

DATED = "{{ strftime_now('%d %B %Y') }}" + CHATML
OPTIONS = {"max_tokens": 6, "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_gguf(source_of("llama"), path, "bf16", "tiny")
    return path


@pytest.fixture(scope="module")
def trained(model):
    return load(model)


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """A function that lets lines be typed."""
    monkeypatch.chdir(tmp_path)
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))


def dialogue(trained, template=None, **facts):
    from language.chat import Dialogue

    return Dialogue(trained.tokenizer, {**trained.recipe.known, **facts}, template)


def test_an_open_model_is_loaded_without_a_run(trained, model):
    assert trained.step == 0 and trained.config.model.layers == 2 and trained.run.name == "tiny.gguf"
    assert sorted(trained.recipe.known) == [
        "chat_template.jinja", "origin", "tokenizer.json", "tokenizer_config.json", "vocabulary"
    ]  # fmt: skip
    made = trained.generate("def ", max_tokens=5, temperature=0)
    assert made == trained.generate("def ", max_tokens=5, temperature=0)
    with pytest.raises(UserError, match="has no steps"):
        load(model, 3)
    with pytest.raises(UserError, match="only the recipe language_model reads"):
        load(model, recipe="other.py")


def test_generate_takes_an_open_model(model, capsys):
    assert main(["generate", str(model), "--prompt", "def ", "--max-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "def "


def test_a_conversation_is_held_answered_and_saved(model, typed, capsys, tmp_path):
    typed("Hello", "  ", "And then?", "/save talk.json")
    assert main(["chat", str(model), "--max-tokens", "6", "--temperature", "0", "--system", "Be brief."]) == 0
    out, messages = capsys.readouterr().out, json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages][::2] == ["Be brief.", messages[2]["content"], messages[4]["content"]]
    assert out == f"{messages[2]['content']}\n{messages[4]['content']}\nsaved 5 messages in talk.json\n"


def test_the_history_is_part_of_what_is_answered(trained, typed):
    typed("Hello", "Hello")
    talk = Conversation(trained, None, OPTIONS)
    talk.run()
    first, second = (message["content"] for message in talk.messages if message["role"] == "assistant")
    assert first == trained.chat(talk.messages[:1], **OPTIONS)
    assert second == trained.chat(talk.messages[:3], **OPTIONS)
    assert len(dialogue(trained).ids(talk.messages[:3])) > len(dialogue(trained).ids(talk.messages[:1]))


def test_answers_share_one_copy_of_the_weights_until_these_change(trained, monkeypatch):
    from aurora_train.generate import sampler

    made, decoded, model = [], sampler.decoded, trained.model
    monkeypatch.setattr(sampler, "decoded", lambda model: made.append(1) or decoded(model))
    before = trained.generate("def ", max_tokens=5, temperature=0)
    count = len(made)
    for _ in range(2):
        trained.chat([{"role": "user", "content": "Hello"}], **OPTIONS)
        assert trained.generate("def ", max_tokens=5, temperature=0) == before
    assert len(made) == count
    kept = model.embedding[...]
    model.embedding[...] = kept[::-1]
    try:
        assert trained.generate("def ", max_tokens=5, temperature=0) != before and len(made) == count + 1
    finally:
        model.embedding[...] = kept


def test_commands_begin_again_and_set_the_system_prompt(trained, typed, capsys):
    talk = Conversation(trained, "One.", OPTIONS)
    typed("Hello", "/reset")
    talk.run()
    assert talk.messages == [{"role": "system", "content": "One."}]
    typed("/system  Two words. ", "/reset", "/help", "/quit", "never read")
    talk.run()
    assert talk.messages == [{"role": "system", "content": "Two words."}]
    typed("/system")
    talk.run()
    assert talk.messages == [] and "/save FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line,says",
    [
        ("/sing", "there is no command /sing"),
        ("/save", "/save needs the name of a file"),
        ("/save taken.json", "taken.json: this file exists"),
        ("/save missing/talk.json", "No such file or directory"),
        ("Say <|im_end|> now", "the message holds the control token `<|im_end|>`"),
    ],
)
def test_a_line_that_cannot_be_done_is_refused_and_loses_nothing(line, says, model, typed, capsys, tmp_path):
    (tmp_path / "taken.json").write_text("mine")
    typed(line, "/save talk.json")
    assert main(["chat", str(model), "--max-tokens", "4"]) == 2
    assert says in capsys.readouterr().err and (tmp_path / "taken.json").read_text() == "mine"
    assert not (tmp_path / "talk.json").exists()


def test_in_a_terminal_a_refused_line_is_said_and_the_conversation_goes_on(trained, typed, capsys):
    typed("/sing", "Hello")
    talk = Conversation(trained, None, OPTIONS)
    talk._interactive = True
    talk.run()
    assert len(talk.messages) == 2 and "there is no command /sing" in capsys.readouterr().err


def test_an_option_out_of_range_is_named_as_it_was_typed(model, typed, capsys):
    typed("Hello")
    assert main(["chat", str(model), "--top-p", "7"]) == 2
    assert "--top-p: " in capsys.readouterr().err


def test_an_answer_ends_at_every_token_that_ends_a_turn(trained):
    ids = {name: trained.tokenizer.controls[name] for name in ("<|endoftext|>", "<|im_end|>")}
    assert dialogue(trained).ends() == set(ids.values())
    # A model that names no such token: what its template writes after an answer ends one.
    assert ids["<|im_end|>"] in dialogue(trained, origin={"eos_ids": []}).ends()


def test_the_ids_are_those_of_the_rendered_text_with_its_control_tokens(trained):
    asked = [{"role": "user", "content": "Hello"}]
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = dialogue(trained).ids(asked)
    assert ids == trained.tokenizer.encode_marked(text).tolist() and ids.count(1) == 2 and ids.count(2) == 1
    assert 1 not in trained.tokenizer.encode(text), "a document does not produce control tokens"


def test_a_template_is_told_the_day_on_which_the_run_began(trained):
    begun = dialogue(trained, DATED, template_date="2026-02-03T10:00:00")
    text = trained.tokenizer.decode(begun.ids([{"role": "user", "content": "Hello"}]))
    assert text.startswith("03 February 2026<|im_start|>user")


def test_a_template_of_ones_own_is_read_and_a_bad_one_named(model, typed, capsys, tmp_path):
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    (tmp_path / "bad.jinja").write_text("one\n{% if %}")
    typed("Hello")
    assert main(["chat", str(model), "--max-tokens", "3", "--template", "plain.jinja"]) == 0
    typed("Hello")
    assert main(["chat", str(model), "--template", "bad.jinja"]) == 2
    assert "--template bad.jinja:2: not a valid template" in capsys.readouterr().err
    (tmp_path / "fails.jinja").write_text("\n{{ messages[0].contnt.strip() }}")
    typed("Hello")
    assert main(["chat", str(model), "--template", "fails.jinja"]) == 2
    assert "--template fails.jinja:2: the template fails" in capsys.readouterr().err
    assert main(["chat", str(model), "--template", "none.jinja"]) == 2
    assert "no such template file" in capsys.readouterr().err


def test_a_conversation_longer_than_the_model_is_refused(trained):
    with pytest.raises(UserError, match="the model holds 256"):
        trained.chat([{"role": "user", "content": "word " * 300}], **OPTIONS)


def test_an_open_model_is_scored_on_a_text_and_leaves_nothing_beside_it(model, typed, capsys, tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time there was a box on a desk. " * 8)
    assert main(["evaluate", str(model), "--on", "story.txt", "--no-baselines", "--quiet", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["score"]["bits_per_byte"] > 1 and record["on"].endswith("story.txt")
    assert [path.name for path in model.parent.iterdir()] == ["tiny.gguf"]
    assert main(["evaluate", str(model)]) == 2
    assert "--on: tiny.gguf is an open model" in capsys.readouterr().err


TUNED = """recipe: language_model
model: {{from: {model}}}
data: {{source: {corpus}, sequence: 16, holdout_test: 0.2, holdout_validation: 0.2, max_documents: 10}}
train: {{steps: 2, batch: 2}}
memory: {{unroll: false}}
evaluate: {{final: false, examples: 4}}
"""


@pytest.mark.slow
def test_a_run_that_began_from_an_open_model_talks_by_its_template_and_keeps_its_first_day(
    model, typed, corpus, shared_cache, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("AURORA_CACHE", str(shared_cache))
    typed("Hello", "/save talk.json")
    (tmp_path / "tuned.yaml").write_text(TUNED.format(model=model, corpus=corpus))
    assert main(["train", "tuned.yaml", "--run", "run", "--quiet"]) == 0, capsys.readouterr().err
    begun = json.loads((tmp_path / "run" / "facts" / "facts.json").read_text())["template_date"]["value"]
    assert main(["resume", "run", "train.steps=3", "--quiet"]) == 0, capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "facts" / "facts.json").read_text())["template_date"]["value"]
    assert kept == begun and len(begun) == len("2026-01-01T00:00:00")
    assert main(["chat", "run", "--max-tokens", "4"]) == 0
    assert len(json.loads((tmp_path / "talk.json").read_text())) == 2
