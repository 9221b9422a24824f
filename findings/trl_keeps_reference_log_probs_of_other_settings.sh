#!/usr/bin/env bash
# trl 1.16.0 (transformers 5.24.0, datasets 5.2.0, torch 2.13.0): `DPOTrainer` with `precompute_ref_log_probs=True` keeps
# the reference's log-probabilities in the cache of `datasets`, under a key of the dataset's fingerprint and of the
# reference's weights alone. What they also depend on is not in it: `ld_alpha`, and `max_length`, which the collator
# applies. With `max_length=None`, or with `truncation_mode="keep_end"`, a second run over the same file with another of
# these settings silently takes the first run's numbers, in another process too: the policy is then compared with
# something else than itself. (With "keep_start" a filter happens to put all arguments into the fingerprint.)
# Seen: the loss of the first step, where policy and reference are one model, is 0.693 = ln 2 the first time, and then
# 0.0025 with another `ld_alpha` and 0.0004 with another `max_length`; alone, over an empty cache, each of them has 0.693.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'trl==1.16.0' 'transformers==5.24.0' 'datasets==5.2.0' 'torch==2.13.0'
cat > "$work/first_loss.py" <<'P'
import json
import math
import sys
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from trl import DPOConfig, DPOTrainer

folder, settings, expected = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, "w0"))
backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1", pad_token="w1")


def words(seed, count):
    return " ".join(f"w{(seed * 7 + k * k) % 60 + 2}" for k in range(count))


file = folder / "pairs.jsonl"
if not file.exists():
    rows = [{"prompt": words(n, 5) + " ", "chosen": words(n + 1, 20), "rejected": words(n + 2, 8)} for n in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=1,
    eos_token_id=1, bos_token_id=1, initializer_range=0.3,
))
trainer = DPOTrainer(
    model=model, processing_class=tokenizer,
    train_dataset=datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache")),
    args=DPOConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, max_steps=1, logging_steps=1, report_to="none",
        per_device_train_batch_size=4, precompute_ref_log_probs=True, disable_tqdm=True, save_strategy="no", **settings,
    ),
)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
loss = trainer.state.log_history[0]["loss"]
print(f"{settings}: the first loss is {loss:.4f}")
assert (abs(loss - math.log(2)) < 1e-4) == (expected == "right"), loss
P
first() { PYTHONWARNINGS=ignore TQDM_DISABLE=1 "$work/venv/bin/python" "$work/first_loss.py" "$work/$1" "$2" "$3" 2>/dev/null; }
mkdir "$work/"{a,b,c,d}
first a '{"max_length": null}' right
first a '{"max_length": null, "ld_alpha": 0.2}' stale
first b '{"max_length": null, "ld_alpha": 0.2}' right
first c '{"max_length": 64, "truncation_mode": "keep_end"}' right
first c '{"max_length": 10, "truncation_mode": "keep_end"}' stale
first d '{"max_length": 10, "truncation_mode": "keep_end"}' right
echo "as described"
