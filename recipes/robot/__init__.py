"""The kit of robot policies: episodes, LeRobot datasets, statistics, chunks of actions, worlds to act in."""
