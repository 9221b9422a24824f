"""What can be set of the recipe `driving/motion`, section by section."""

from __future__ import annotations

from aurora_train.config import Section, setting

SIMULATED, SUMO = "simulated", "sumo"


class ModelConfig(Section):
    """Agents x time attention over motion tokens."""

    width: int = setting(64, ge=8, help="size of the residual stream")
    layers: int = setting(2, ge=1, help="units of time, lane and agent attention and an MLP")
    heads: int = setting(4, ge=1, help="attention heads")
    relation: int = setting(16, ge=4, help="features of a pair that attention reads")
    tokens: int = setting(384, ge=16, help="templates of half a second of motion")


class DataConfig(Section):
    """The scenes, and how much of each is seen."""

    source: str = setting(SIMULATED, resume="located", path_unless=(SIMULATED, SUMO),
                          help="simulated, sumo, or a folder of Argoverse 2 scenarios")  # fmt: skip
    agents: int = setting(12, ge=1, help="agents of a scene that are seen, the nearest to the focal agent")
    pieces: int = setting(32, ge=1, help="pieces of lanes that are seen, likewise")
    piece_m: float = setting(120.0, gt=1, help="metres; longer lanes are cut into pieces")
    lights: int = setting(8, ge=1, help="traffic lights that are seen, likewise")
    noise: float = setting(0.1, ge=0, help="metres; how far tokens stray from the recording in training")
    held_out: float = setting(0.2, gt=0, lt=0.6, help="recordings: share of maps to test on; half as many to validate")
    simulated_maps: int = setting(200, ge=2, help="simulated: roads by seed, to train on")
    simulated_held_out: int = setting(24, ge=1, help="simulated: other roads for the test; a third of it to validate")
    simulated_scenes: int = setting(4, ge=1, help="simulated: scenes of 11 s on each map")
    simulated_seed: int = setting(0, ge=0, help="simulated: seed of the traffic, separate from the run's")


class RolloutConfig(Section):
    """How the model drives when it is scored."""

    scenes: int = setting(96, ge=1, resume="free", help="scenes of the split that are rolled out")
    samples: int = setting(16, ge=6, resume="free", help="forecasts of a scene, from which six modes are chosen")
    temperature: float = setting(1.0, ge=0, resume="free", help="of the draw of a template; 0 takes the likeliest")
    top_p: float = setting(0.95, gt=0, le=1, resume="free", help="share of the likeliest templates that are drawn from")
    batch: int = setting(64, ge=1, resume="free", help="rollouts at once")
    films: int = setting(3, ge=0, resume="free", help="scenes that are shown in the report, collisions first")
    sumo_maps: int = setting(0, ge=0, resume="free", help="maps of SUMO to drive on among cars that react; 0 = none")


class LimitsConfig(Section):
    """The largest rates, in closed loop within 6 s among agents that replay, with which anyone goes on."""

    collision_max: float | None = setting(None, ge=0, le=1, resume="free", help="share of scenes with a collision")
    off_road_max: float | None = setting(None, ge=0, le=1, resume="free", help="share that leaves the drivable area")
    red_light_max: float | None = setting(None, ge=0, le=1, resume="free", help="share that runs a red light")
    infeasible_max: float | None = setting(None, ge=0, le=1, resume="free", help="share that moves as no car can")

    def exceeded(self, scores: dict[str, float]) -> list[str]:
        """A line for each limit that the numbers of a score exceed; one that is missing or nan exceeds it, too."""
        lines = []
        for name in ("collision", "off_road", "red_light", "infeasible"):
            most, value = getattr(self, f"{name}_max"), scores.get(f"driven_{name}_6s")
            if most is not None and (value is None or not value <= most):
                measured = "no number" if value is None else f"{value:.3f}"
                lines.append(f"limits.{name}_max is {most:g}, and driven_{name}_6s is {measured}")
        return lines


class Config(Section):
    model: ModelConfig = setting(ModelConfig())
    data: DataConfig = setting(DataConfig())
    rollout: RolloutConfig = setting(RolloutConfig())
    limits: LimitsConfig = setting(LimitsConfig())
