"""The harness of the GPU's figures, without a GPU: its parts, and on tiny shapes all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def start(*arguments, cache, timeout=500):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "AURORA_CACHE": str(cache)}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def job(case="tiny", sequence=64):
    from gpu_cases import CASES, TINY, Job

    return Job(case, (CASES | TINY)[case], sequence)


def test_without_a_gpu_it_says_so_in_one_line(shared_cache):
    done = start("--case", "125m", cache=shared_cache)
    assert done.returncode == 2 and "jax sees no GPU" in done.stderr and "--tiny" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["--case", "tiny"], ["--tiny", "--case", "1b"], ["--rounds", "0"], ["--folder", "/not/there"]]
)
def test_what_cannot_be_asked_is_refused_before_anything_starts(arguments, capsys):
    import gpu

    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2 and arguments[-2].lstrip("-") in capsys.readouterr().err


def test_what_cannot_fit_the_card_is_left_out_unless_it_is_asked_for(monkeypatch, capsys):
    import gpu
    from gpu_cases import CASES

    class Sized:
        def __init__(self, case, shape, sequence):
            self.name = self.case = case
            trained = {"3b": 3 * 10**9, "8b-lora": 4 * 10**7}.get(case, 10**9)
            self.parameters = (trained, 8 * 10**9 if "lora" in shape.model else 0)

    monkeypatch.setattr(gpu, "Job", Sized)
    card = {"memory": 24 * 10**9}
    every, asked = gpu.parse(["--sequence", "2048"]), gpu.parse(["--sequence", "2048", "--case", "3b"])
    assert [job.case for job in gpu.jobs_of(every, card)] == [name for name in CASES if name != "3b"]
    assert "3b: left out, it takes 48.0 GB" in capsys.readouterr().out
    assert [job.case for job in gpu.jobs_of(asked, card)] == ["3b"] and capsys.readouterr().out == ""


def test_a_profile_that_is_refused_is_not_measured(tmp_path):
    import gpu

    (tmp_path / "tiny-64").mkdir()
    (tmp_path / "tiny-64" / "file").touch()
    told = gpu.profile(job(), gpu.parse(["--tiny", "--profile", str(tmp_path), "--folder", str(tmp_path)]))
    assert told.startswith("profile of tiny T 64: not measured (") and "a folder of its own" in told


def test_torch_out_of_memory_is_told_from_other_faults(monkeypatch, capsys):
    pytest.importorskip("torch")
    import torch_peer

    def failing(words):
        def make_step(work):
            raise RuntimeError(words)

        return make_step

    work = torch_peer.Work({}, 8, 8, 1)
    for words in ("CUDA out of memory. Tried to allocate 2.00 GiB.", "CUBLAS_STATUS_ALLOC_FAILED when calling ..."):
        monkeypatch.setattr(torch_peer, "make_step", failing(words))
        torch_peer.serve(work)
        assert capsys.readouterr().out == f"{torch_peer.OUT_OF_MEMORY}\n"
    monkeypatch.setattr(torch_peer, "make_step", failing("no kernel image"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        torch_peer.serve(work)


def test_torch_tries_ever_smaller_microbatches_and_recomputes_last():
    import gpu

    assert gpu.attempts(4) == [(4, False), (2, False), (1, False), (4, True), (2, True), (1, True)]
    assert [microbatch for microbatch, _ in gpu.attempts(21)][:4] == [21, 7, 3, 1]


def test_the_first_way_that_fits_is_kept_and_only_memory_is_a_reason_to_go_on():
    import gpu
    from sides import Ended
    from torch_peer import OUT_OF_MEMORY

    class Shape:
        def work(self, kind, microbatch, checkpointing):
            return microbatch, checkpointing

    def opening(fits, words=OUT_OF_MEMORY):
        def open_side(work):
            if not fits(*work):
                raise Ended(words)
            return work

        return open_side

    ways = gpu.attempts(4)
    side, left = gpu.first_that_fits(Shape(), "compiled", ways, opening(lambda m, c: c and m <= 2))
    assert side == (2, True) and left == [(2, True), (1, True)]
    with pytest.raises(Ended, match="does not fit"):
        gpu.first_that_fits(Shape(), "compiled", ways, opening(lambda m, c: False))
    with pytest.raises(Ended, match="no compiler"):
        gpu.first_that_fits(Shape(), "compiled", ways, opening(lambda m, c: m < 4, "no compiler"))


def test_a_side_that_ends_says_why(tmp_path):
    from sides import Ended, Side

    with pytest.raises(Ended) as ended:
        Side("-c", "print('out of memory')")
    assert ended.value.code == "out of memory"
    with pytest.raises(Ended) as ended:
        Side("-c", "1 / 0", stderr=tmp_path / "stderr")
    assert ended.value.words == "ZeroDivisionError: division by zero"
    side = Side("-c", "print('ready', flush=True); input(); 1 / 0", stderr=tmp_path / "stderr")
    with pytest.raises(Ended, match="ZeroDivisionError"):
        side.run(1.0)
    side.close()
    assert Ended("starting\nerror: no plan fits\n  budget: 1 GB").words == "no plan fits"


class Given:
    """A job of 1,000 tokens of 2,000 FLOPs each."""

    case, sequence, batch, tokens, parameters, flops_per_token = "1b", 250, 4, 1000, (300, 0), 2000.0


def taken(*seconds):
    return [{"seconds": one, "memory": 10**9, "how": "1 x 4", "parameters": [300, 0]} for one in seconds]


def test_rates_are_medians_and_mfu_is_of_the_cards_peak():
    from gpu import summary
    from gpu_table import goals, row

    rounds = {"ours": taken(0.5, 0.4, 1.0), "eager": taken(2.0, 2.0, 2.0), "compiled": taken(0.6, 0.6, 0.6)}
    found = summary(Given, {"peak_flops": 5e6}, rounds, {})
    assert found["sides"]["ours"]["tokens_per_s"] == 2000 and found["sides"]["ours"]["mfu"] == pytest.approx(0.8)
    assert found["best"] == "compiled" and found["ratio"] == pytest.approx(1.2)
    assert found["ratios"] == pytest.approx([1.2, 1.5, 0.6])
    assert "**1.20** (0.60 to 1.50)" in row(found) and "80.0%" in row(found)
    assert "met" in goals([found])[0] and "not met" not in goals([found])[0]


def test_8_bits_are_set_beside_16_where_they_are_asked_for():
    from gpu import summary
    from gpu_table import fp8_table, header, row

    rounds = {"ours": taken(0.5, 0.4, 1.0), "ours in fp8": taken(0.4, 0.4, 0.5), "compiled": taken(0.6, 0.6, 0.6)}
    found = summary(Given, {"peak_flops": 5e6}, rounds, {})
    assert found["best"] == "compiled" and found["fp8_ratios"] == pytest.approx([1.25, 1.0, 2.0])
    assert "**1.25** (1.00 to 2.00)" in fp8_table([found])[-1] and "100.0%" in fp8_table([found])[-1]
    assert row(found).count("|") == header().splitlines()[0].count("|")
    assert fp8_table([summary(Given, {"peak_flops": None}, {"ours": taken(0.5)}, {})]) == []


def test_what_was_not_measured_is_said_and_never_a_number():
    from gpu import summary
    from gpu_table import NONE, goals, header, notes, row

    found = summary(Given, {"peak_flops": None}, {"ours": taken(0.5), "compiled": []}, {"compiled": "does not fit"})
    assert found["ratio"] is None and found["best"] is None and found["sides"]["ours"]["mfu"] is None
    line = row(found)
    assert line.count("|") == header().splitlines()[0].count("|") and line.count(NONE) == 5 and "| n/a |" in line
    assert notes([found]) == [f"1b T 250, compiled: {NONE}: does not fit"]
    assert all(line.endswith(NONE) for line in goals([found]))


def test_the_real_cases_are_the_models_that_they_are_named_after():
    from gpu_cases import CASES

    for name, millions in {"125m": 114, "350m": 317, "1b": 1236, "3b": 3213, "8b-lora": 8030}.items():
        model, sizes = job(name).resolved.model, CASES[name]
        assert model.num_parameters(sizes.vocabulary) / 1e6 == pytest.approx(millions, abs=1), name
        assert (model.norm, model.activation, model.positions) == ("rmsnorm", "swiglu", "rope")
        assert model.num_kv_heads < model.heads and model.tied == (name != "8b-lora")
        assert (job(name, 2048).batch, job(name, 8192).batch) == (32, 8)


def test_the_peer_is_causal_and_trains_what_it_says():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch_peer import Work, make_step

    shape = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 64, "tied": False}
    work = Work(shape, 64, 16, 4, kind="eager", microbatch=2, checkpointing=True)
    for lora in (None, {"rank": 2, "alpha": 4.0, "targets": ["query", "down"]}):
        model, step = make_step(Work(**{**vars(work), "model": shape | ({"lora": lora} if lora else {})}))
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        step()
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        adapters = {name for name in before if name.endswith((".down.weight", ".up.weight"))}
        assert changed == (adapters if lora else set(before)) and len(adapters) == (8 if lora else 0)
        tokens = torch.arange(16)[None]
        other = tokens.clone()
        other[:, 10:] = 3
        with torch.autocast("cpu", torch.bfloat16):
            first, second = (model(one).logits for one in (tokens, other))
        assert torch.equal(first[:, :10], second[:, :10]) and not torch.equal(first[:, 10:], second[:, 10:])


def test_the_compiled_peer_has_attention_without_a_mask():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from torch_peer import Work, make_model

    llama = {"width": 32, "layers": 1, "heads": 4, "kv_heads": 2, "mlp_width": 64, "tied": True}
    for shape, grouped in ((llama, True), (llama | {"norm": "layernorm"}, False)):
        calls = []

        def seen(graph, _, calls=calls):
            calls.extend(node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
            return graph

        model = make_model(Work(shape, 64, 16, 2))
        torch.compile(lambda tokens, model=model: model(tokens).logits, backend=seen)(torch.zeros(2, 16, dtype=int))
        assert len(calls) == 1
        told = calls[0].kwargs
        assert told["attn_mask"] is None and told["is_causal"] is True
        assert told.get("enable_gqa", False) is grouped


@pytest.mark.release
def test_the_compiled_peer_recomputes_and_accumulates(shared_cache):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from gpu_cases import TINY, Job
    from torch_peer import torch_side

    tiny = Job("tiny-lora", TINY["tiny-lora"], 64, shared_cache)
    side = torch_side(tiny.work("compiled", 2, True), environment={"CUDA_VISIBLE_DEVICES": ""})
    assert 0 < side.run(0.5) < 60 and int(side.ask("memory")) > 10**8
    assert side.ask("parameters") == " ".join(map(str, tiny.parameters))
    side.close()


@pytest.mark.release
def test_the_whole_path_on_tiny_shapes(shared_cache, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    written, traces = tmp_path / "gpu.json", tmp_path / "traces"
    done = start(
        "--tiny", "--fp8", "--rounds", 1, "--seconds", 1, "--json", written, "--profile", traces, "--folder", tmp_path,
        cache=shared_cache,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(written.read_text())
    assert found["card"]["peak_flops"] is None
    assert [row["case"] for row in found["rows"]] == ["tiny", "tiny-lora"]
    for row in found["rows"]:
        for side in ("ours", "ours in fp8", "compiled"):
            told = row["sides"][side]
            assert told["why"] is None and told["tokens_per_s"] > 0 and told["memory_bytes"] > 0, told
            assert told["mfu"] is None
        assert row["ratio"] > 0 and row["best"] == "compiled" and len(row["fp8_ratios"]) == 1
    width, layers, inner, table = 64, 2, 128, 257 * 64
    kernels = layers * (width * (2 * 64 + 2 * 32) + 3 * width * inner)
    adapters = layers * 4 * (2 * (width + 64) + 2 * (width + 32) + 3 * (width + inner))
    norms, attention = (2 * layers + 1) * width, 6 * layers * 64 * width
    dense, adapted = found["rows"]
    assert (dense["trained"], dense["frozen"]) == (kernels + norms + table, 0)
    assert dense["flops_per_token"] == 6 * (kernels + norms + table) + attention
    assert (adapted["trained"], adapted["frozen"]) == (adapters, kernels + norms + 2 * table)
    assert adapted["flops_per_token"] == 6 * adapters + 4 * (kernels + norms + table) + attention
    assert "tiny T 64, ours in fp8: fp8: products of the blocks" in done.stdout
    assert "tiny T 64, ours: attention:" in done.stdout and "| mlp | product |" in done.stdout
    assert (traces / "tiny-64").is_dir() and not list(tmp_path.glob("tmp*"))
