"""The config sections of robot policies. Free of numpy and jax: `aurora check` imports them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from aurora_train.config import Section, setting
from robot.limits import Limits

WORLD = "world:"  # begins a source whose demonstrations are recorded by a world's own expert
PICTURE = 64  # edge of the pictures of a world, unless the config says another
VECTORS = ("observation.state", "observation.environment_state")


class Vision(Section):
    """What turns a camera's picture into tokens; all cameras share its parameters."""

    kind: Literal["cnn", "keypoints", "vit"] = setting(
        "cnn", help="four strided convolutions, the places of learned features (spatial softmax), or patches and a "
        "transformer",
    )  # fmt: skip
    channels: int = setting(
        32, ge=8, multiple_of=8, help="cnn, keypoints: channels of the first convolution; the next have 2, 4 (and cnn "
        "again 4) times as many",
    )
    patch: int = setting(8, ge=2, help="vit: edge of a patch in pixels")
    layers: int = setting(2, ge=1, help="vit: blocks over the patches of one picture")
    shift: int = setting(4, ge=0, help="pixels by which a picture is moved at random in training (Yarats et al. 2021)")


class Noising(Section):
    """How flow matching and diffusion are sampled."""

    steps: int = setting(10, resume="free", ge=1, help="steps from noise to actions")
    solver: Literal["euler", "midpoint"] = setting(
        "euler", resume="free", help="flow: rule of a step; midpoint (second order) calls the model twice"
    )
    levels: int = setting(100, ge=2, help="diffusion: levels of noise in training (squared-cosine schedule)")


class ModelConfig(Section):
    """An encoder of what is observed, and a decoder of the chunk of actions that reads it."""

    kind: Literal["act", "flow", "diffusion", "cloning"] = setting(
        "act", help="ACT (Zhao et al. 2023), flow matching (Lipman et al. 2023), diffusion (Chi et al. 2023), or "
        "behaviour cloning by squared error",
    )  # fmt: skip
    width: int = setting(128, ge=2, multiple_of=2, help="size of the residual stream")
    heads: int = setting(4, ge=1, help="attention heads")
    layers: int = setting(2, ge=1, help="blocks of the encoder")
    decoder_layers: int = setting(
        2, ge=1, help="layers of the decoder: attention to itself, to the encoder, and an MLP"
    )
    mlp_width: int | None = setting(None, ge=1, help="hidden size of the MLPs; none: 4 width")
    activation: Literal["gelu", "relu"] = setting("gelu", help="of the MLPs")
    norm_place: Literal["before", "sum"] = setting(
        "before", help="normalise the input of attention and MLP, or the sum with the residual stream (as ACT does)"
    )
    dropout: float = setting(0.0, ge=0, lt=1, help="share of each block's output dropped in training")
    latent: int = setting(32, ge=1, help="act: size of the style variable")
    posterior_layers: int = setting(2, ge=1, help="act: blocks of the encoder of actions, used in training alone")
    kl_weight: float = setting(10.0, ge=0, help="act: weight of the KL divergence beside the absolute error")
    noising: Noising = setting(Noising())
    vision: Vision = setting(Vision())

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.width % self.heads:
            fitting = [n for n in range(1, self.width + 1) if self.width % n == 0]
            near = min(fitting, key=lambda n: (abs(n - self.heads), -n))
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width}); heads: {near} would")
        return self

    @model_validator(mode="after")
    def _sampler_fits(self):
        noising = self.noising
        if self.kind == "diffusion" and noising.steps > noising.levels:
            raise ValueError(f"diffusion has {noising.levels} levels of noise (noising.levels) and cannot pass through "
                             f"{noising.steps}; noising.steps: {noising.levels} at most")  # fmt: skip
        if self.kind == "diffusion" and noising.solver != "euler":
            raise ValueError("noising.solver is a setting of flow, and diffusion has none; leave it out")
        return self


class DataConfig(Section):
    """Demonstrations: where they come from, and which of their features are used."""

    source: str = setting(
        f"{WORLD}two_modes", resume="located", path_unless=(WORLD,),
        help="the folder of a LeRobot v3.0 dataset, or world:NAME, whose own expert is recorded",
    )  # fmt: skip
    episodes: int | None = setting(
        None, ge=2, help="how many demonstrations: the first of a dataset (none: all), or so many are recorded (100)"
    )
    seed: int = setting(0, ge=0, help="seed of recorded demonstrations, separate from the run's")
    noise: float = setting(
        0.0, ge=0, lt=1,
        help="deviation of what is added to the expert's actions while recording, as a share of their half range: so "
        "demonstrations show how to come back from errors (Laskey et al. 2017)",
    )  # fmt: skip
    image: int | None = setting(
        None, ge=8, help="edge in pixels of square pictures: a dataset's are resized to it (none: they are not), a "
        f"world's are drawn so (none: {PICTURE})",
    )  # fmt: skip
    chunk: int = setting(16, ge=1, help="actions that are predicted at once")
    state: list[str] | None = setting(
        None, min_length=1, help=f"vector features that the policy sees; none: {' and '.join(VECTORS)}, where they are"
    )
    language: str | None = setting(
        None, resume="located", path_unless=("hub:", "package:"),
        help="a language model that reads the instructions: a run, a Hugging Face folder, a GGUF file or package:NAME; "
        "none: hashed words, which know nothing of meaning",
    )  # fmt: skip
    cameras: list[str] = setting([], help="cameras that the policy sees: NAME of observation.images.NAME")
    action: str = setting("action", help="the feature that is predicted")
    validation: float = setting(0.1, ge=0, lt=0.6, help="share of episodes held out for evaluation while training")
    test: float = setting(0.0, ge=0, lt=0.6, help="share of episodes held out for the score of actions")


class Scoring(Section):
    """The rollouts by which a policy is scored."""

    world: str | None = setting(None, resume="free", help="where it acts; none: that of data.source, if it is a world")
    episodes: int = setting(50, resume="free", ge=1, help="rollouts of a score, each with its own start and goal")
    seed: int = setting(1_000_000, resume="free", ge=0, help="seed of the first rollout; the next have the next seeds")
    execute: int | None = setting(
        None, resume="free", ge=1, help="actions of a chunk that are executed before the next; none: half of them"
    )
    ensemble: float | None = setting(
        None, resume="free", ge=0,
        help="ask at every frame, and average what chunks say of it by exp(-ensemble * age), oldest first (ACT: 0.01)",
    )  # fmt: skip
    gifs: int = setting(2, resume="free", ge=0, help="rollouts shown as moving pictures in the report")

    @model_validator(mode="after")
    def _one_way(self):
        if self.ensemble is not None and self.execute not in (None, 1):
            raise ValueError("an ensemble asks at every frame: leave execute out")
        return self


class Config(Section):
    model: ModelConfig = setting(ModelConfig())
    data: DataConfig = setting(DataConfig())
    score: Scoring = setting(Scoring())
    limits: Limits = setting(Limits())
