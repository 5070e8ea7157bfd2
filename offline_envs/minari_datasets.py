"""Minari's datasets, with the environments that they recover."""

from pathlib import Path

import gymnasium as gym
import numpy as np

from .datasets import join
from .offline_env import OfflineEnv


class MinariEnv(OfflineEnv):
    """The environment that a Minari dataset recovers, its observations flattened, and the dataset in D4RL's layout.
    Datasets are found in ~/.minari/datasets (or $MINARI_DATASETS_PATH) or downloaded by Minari."""

    def __init__(self, dataset_id, render_mode=None):
        import minari

        self.minari = minari.load_dataset(dataset_id, download=True)
        env = self.minari.recover_environment(eval_env=True, **({"render_mode": render_mode} if render_mode else {}))
        self.space, metadata = env.observation_space, self.minari.storage.metadata
        if not isinstance(self.space, gym.spaces.Box):
            env = gym.wrappers.FlattenObservation(env)
        self.has_references = metadata.get("ref_max_score", 0) != metadata.get("ref_min_score", 0)
        references = (metadata["ref_min_score"], metadata["ref_max_score"]) if self.has_references else (0.0, 100.0)
        super().__init__(env, Path(self.minari.spec.data_path), *references)

    def provenance(self, path=None):
        data = "of another file than Minari's" if path else "Minari's"
        if not self.has_references:
            return f"The score is the return itself, Minari has no references of this dataset; the data are {data}."
        scores = f"0 at a return of {self.ref_min_score:g}, 100 at {self.ref_max_score:g}"
        return f"Score: {scores}, by Minari's references, which are not D4RL's numbers; the data are {data}."

    def get_dataset(self, path=None):
        """All episodes, or the arrays of another file in D4RL's layout."""
        if path:
            return super().get_dataset(path)
        episodes = []
        for episode in self.minari.iterate_episodes():
            obs = flatten(self.space, episode.observations)  # (T + 1, O)
            arrays = {"observations": obs[:-1], "next_observations": obs[1:], "actions": episode.actions}
            episodes.append(arrays | {"rewards": episode.rewards, "terminals": episode.terminations})
        return join(episodes)


def flatten(space, batch):
    """What gym.spaces.flatten makes of each of a batch of samples of a Box, or of Boxes in a Dict: (B, ...)."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(part, batch[key]) for key, part in space.spaces.items()], 1)
    assert isinstance(space, gym.spaces.Box), f"observations of {space} cannot be flattened"
    return np.asarray(batch).reshape(len(batch), -1)


gym.register("minari-v0", entry_point=f"{__package__}:MinariEnv", kwargs={"dataset_id": None})
