"""Run by a Python that has av2: read scenarios, write them again with its own writer, and score predictions.

    python av2_side.py FOLDER_OF_SCENARIOS PREDICTIONS.npz FOUND.npz FOLDER_FOR_ITS_OWN
"""

import sys
from pathlib import Path

import numpy as np
from av2.datasets.motion_forecasting import scenario_serialization
from av2.datasets.motion_forecasting.eval import metrics
from av2.map.map_api import ArgoverseStaticMap


def main(folder: Path, predictions: Path, place: Path, own: Path) -> None:
    found = {}
    forecasts = np.load(predictions)
    for number, path in enumerate(sorted(folder.glob("*/scenario_*.parquet"))):
        scenario = scenario_serialization.load_argoverse_scenario_parquet(path)
        copy = own / path.parent.name / path.name
        copy.parent.mkdir(parents=True)
        scenario_serialization.serialize_argoverse_scenario_parquet(copy, scenario)
        tracks = {track.track_id: track for track in scenario.tracks}
        for name, track in tracks.items():
            found[f"{number}/track/{name}"] = np.array(
                [[s.timestep, *s.position, s.heading, *s.velocity, s.observed] for s in track.object_states]
            )
            found[f"{number}/kind/{name}"] = track.object_type.value
        road = ArgoverseStaticMap.from_json(next(path.parent.glob("log_map_archive_*.json")))
        for lane in road.get_scenario_lane_segments():
            found[f"{number}/lane/{lane.id}"] = lane.left_lane_boundary.xyz[:, :2]
            found[f"{number}/after/{lane.id}"] = lane.successors
        found[f"{number}/areas"] = len(road.get_scenario_vector_drivable_areas())
        found[f"{number}/crossings"] = np.array([c.polygon[:4, :2] for c in road.get_scenario_ped_crossings()])
        future = {s.timestep: s.position for s in tracks[scenario.focal_track_id].object_states if not s.observed}
        truth = np.array([future[step] for step in sorted(future)])
        for steps in (30, 60):
            guess = forecasts[f"{number}"][:, :steps]
            found[f"{number}/ade/{steps}"] = metrics.compute_ade(guess, truth[:steps])
            found[f"{number}/fde/{steps}"] = metrics.compute_fde(guess, truth[:steps])
            found[f"{number}/miss/{steps}"] = metrics.compute_is_missed_prediction(guess, truth[:steps])
    np.savez(place, **found)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
