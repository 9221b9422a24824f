"""GPT-2: learned positions, LayerNorm, biases everywhere, and kernels stored as (in, out)."""

from aurora_train.interop.families.family import Family, Key, Rows, Weight, norm

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _conv1d(theirs: str, *ours: str) -> tuple[Weight, Weight]:
    biases = tuple(f"{name}_bias" for name in ours)
    return Weight(f"{theirs}.weight", ours, transpose=False, axis=1), Weight(f"{theirs}.bias", biases)


FAMILIES = (
    Family(
        model_type="gpt2", architecture="GPT2LMHeadModel", title="GPT-2",
        shape={"norm": "layernorm", "bias": "all", "positions": "learned"},
        keys={
            "n_embd": "width", "n_layer": "layers", "n_head": "heads", "n_inner": "mlp_width",
            "n_positions": "max_length", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied",
            "activation_function": Key(
                "activation", _ACTIVATIONS.get, {"gelu_tanh": "gelu_new", "gelu": "gelu"}.get
            ),
        },
        absent={"n_inner": None, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                "activation_function": "gelu_new"},
        only={"activation_function": tuple(_ACTIVATIONS), "scale_attn_weights": (True,),
              "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        rows=Rows(), layer="transformer.h.{}.",
        block=(
            *norm("ln_1", "attn_norm"), *norm("ln_2", "mlp_norm"),
            *_conv1d("attn.c_attn", "attention.query", "attention.key", "attention.value"),
            *_conv1d("attn.c_proj", "attention.out"), *_conv1d("mlp.c_fc", "mlp.up"),
            *_conv1d("mlp.c_proj", "mlp.down"),
        ),
        outer=(
            Weight("transformer.wte.weight", ("embedding",), transpose=False),
            Weight("transformer.wpe.weight", ("positions",), transpose=False),
            *norm("transformer.ln_f", "final_norm"), Weight("lm_head.weight", ("head",)),
        ),
        aliases=tuple((name, f"transformer.{name}") for name in ("wte.", "wpe.", "h.", "ln_f.")),
        unused=(".attn.bias", ".attn.masked_bias"),
    ),
)  # fmt: skip
